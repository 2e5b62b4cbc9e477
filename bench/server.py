"""`pumice serve` with the bundled model: when it is ready, what it adds to an answer, and 64 clients at once.

    python bench/server.py [--parts ready latency load] [--minutes 5] [--clients 64] [--rounds 40]

ready: from the start of the process to the first answer of /health, and its memory then, without a model. latency: the
same questions, one at a time, of the Python API in this process and of a server, in turn: medians of the time to the
first piece, and between pieces. load: so many clients stream answers all the time, a tenth of them goes away in the
middle; each answer must be the one that the question has alone. Memory of the server's process, each second (Linux).

Writes bench/results-server.md (`--output` names another file). Ends with 1 if an answer was lost or another's.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import httpx2
from cpu import processor
from PIL import Image, ImageDraw

import pumice
from pumice import Question, Sampling

HERE = Path(__file__).resolve().parent
MODEL = "pebble"
LEAVING = 0.1
"""Of the clients that ask, so many go away in the middle."""
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
QUESTIONS = ("What is in the picture?", "Which colour is it?", "How many shapes are there?", "Describe the picture.")
LONGEST = 48
STARTS = 5
APART_S = 0.1
"""Threads of the one process wait for more work for a while, and keep the other's from running."""
PARTS = ("ready", "latency", "load")


def pictures() -> list[bytes]:
    """Small pictures of one square each."""
    found = []
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (64, 64), "gray")
        ImageDraw.Draw(picture).rectangle((8 + number, 8, 40, 40 + number), fill=colour)
        data = io.BytesIO()
        picture.save(data, "PNG")
        found.append(data.getvalue())
    return found


def cases() -> list[tuple[str, bytes]]:
    return [(question, picture) for picture in pictures() for question in QUESTIONS]


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """A `pumice serve`: its base URL, and its process."""
    command = [sys.executable, "-m", "pumice", "serve", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            while not (line := _first(log)).endswith("\n"):
                time.sleep(0.005)
            yield line.split()[-1], process.pid
        finally:
            process.terminate()


def _first(log: IO[str]) -> str:
    log.seek(0)
    return log.readline()


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as rollup:
        lines = dict(line.split(":", 1) for line in rollup.readlines()[1:])
    return (int(lines["Rss"].split()[0])) / 1000


def ready() -> dict[str, str]:
    seconds, memory = [], []
    for _ in range(STARTS):
        started = time.perf_counter()
        with server() as (base, pid):
            while True:
                try:
                    httpx2.get(base + "/health").raise_for_status()
                    break
                except httpx2.TransportError:
                    time.sleep(0.005)
            seconds.append(time.perf_counter() - started)
            memory.append(resident_mb(pid))
    return {
        "from start to the first answer, s": _spread(seconds),
        "memory without a model, MB": _spread(memory),
    }


def body(question: str, picture: bytes) -> dict[str, object]:
    message = {"role": "user", "content": question, "images": [base64.b64encode(picture).decode()]}
    return {"model": MODEL, "messages": [message], "options": {"temperature": 0, "num_predict": LONGEST}}


def latency(rounds: int) -> dict[str, str]:
    """Of each question in turn; the first round warms both."""
    model = pumice.load(MODEL)
    firsts: dict[str, list[float]] = {"API": [], "server": []}
    tokens: dict[str, list[float]] = {"API": [], "server": []}
    chosen = cases()
    with server() as (base, _), closing(http.client.HTTPConnection(base.partition("//")[2])) as client:

        def of_api(question: str, picture: bytes) -> list[float]:
            started, times = time.perf_counter(), []
            sampling = Sampling(max_tokens=LONGEST)
            for _ in model.stream(question, picture, sampling=sampling):
                times.append(time.perf_counter() - started)
            return times

        def of_server(question: str, picture: bytes) -> list[float]:
            started, times = time.perf_counter(), []
            client.request("POST", "/api/chat", json.dumps(body(question, picture)))
            answer = client.getresponse()
            while line := answer.readline():
                if not json.loads(line)["done"]:
                    times.append(time.perf_counter() - started)
            return times

        for number in range(-4, rounds):
            question, picture = chosen[number % len(chosen)]
            for name, ask in (("API", of_api), ("server", of_server)):
                time.sleep(APART_S)
                times = ask(question, picture)
                if number >= 0 and len(times) > 1:
                    firsts[name].append(times[0] * 1000)
                    tokens[name].append((times[-1] - times[0]) / (len(times) - 1) * 1000)
    more_first = statistics.median(b - a for a, b in zip(firsts["API"], firsts["server"]))
    more_token = statistics.median(b - a for a, b in zip(tokens["API"], tokens["server"]))
    return {
        "first piece, Python API, ms": _spread(firsts["API"]),
        "first piece, server, ms": _spread(firsts["server"]),
        "what the server adds to it, ms (median of pairs)": f"{more_first:.2f}",
        "a piece after it, Python API, ms": _spread(tokens["API"]),
        "a piece after it, server, ms": _spread(tokens["server"]),
        "what the server adds to a piece, ms (median of pairs)": f"{more_token:.2f}",
    }


def load(minutes: float, clients: int, counts: Counter[str]) -> dict[str, str]:
    model = pumice.load(MODEL)
    known = [
        (*case, model.answer(Question(case[0], case[1], sampling=Sampling(max_tokens=LONGEST))).text)
        for case in cases()
    ]
    memory: list[tuple[float, float]] = []
    with server() as (base, pid):
        asyncio.run(_crowd(base, known, minutes, clients, counts, pid, memory))
        time.sleep(2)
        standing = _gauges(httpx2.get(base + "/metrics").text)
    quarter = len(memory) // 4
    parts = [memory[each * quarter : (each + 1) * quarter] for each in range(4)]
    means = [statistics.mean(value for _, value in part) for part in parts] if quarter else []
    counts["held"] += int(standing["pumice:num_requests_running"] or standing["pumice:kv_cache_usage_perc"] > 0)
    return {
        "clients at once": str(clients),
        "minutes": f"{minutes:g}",
        "answers that ended, each the right one": str(counts["right"]),
        "clients that went away in the middle": str(counts["left"]),
        "lost": str(counts["lost"]),
        "wrong, or another's": str(counts["wrong"]),
        "running at the end": f"{standing['pumice:num_requests_running']:g}",
        "share of the cache held at the end": f"{standing['pumice:kv_cache_usage_perc']:g}",
        "memory of the server, quarters of the time, MB": ", ".join(f"{each:.0f}" for each in means),
    }


async def _crowd(base, known, minutes, clients, counts, pid, memory) -> None:  # type: ignore[no-untyped-def]
    ends = time.monotonic() + 60 * minutes
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=base, timeout=600, limits=limits) as client:

        async def watch() -> None:
            while True:
                memory.append((time.monotonic(), resident_mb(pid)))
                await asyncio.sleep(1)

        async def one(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < ends:
                counts[await _ask(client, draw, *draw.choice(known))] += 1

        watching = asyncio.create_task(watch())
        await asyncio.gather(*map(one, range(clients)))
        watching.cancel()


async def _ask(client: httpx2.AsyncClient, draw: random.Random, question: str, picture: bytes, text: str) -> str:
    """What became of one question: right, left, lost or wrong."""
    leaves = draw.random() < LEAVING
    pieces: list[str] = []
    try:
        async with client.stream("POST", "/api/chat", json=body(question, picture)) as answer:
            async for line in answer.aiter_lines():
                said = json.loads(line)
                if "error" in said:
                    return "lost"
                pieces.append(said["message"]["content"])
                if leaves:
                    return "left" if text.startswith("".join(pieces)) else "wrong"
                if said["done"]:
                    return "right" if "".join(pieces) == text else "wrong"
    except httpx2.HTTPError:
        return "lost"
    return "lost"


def _gauges(text: str) -> dict[str, float]:
    """Sums over models."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("ready", "latency", "load"), default=("ready", "latency", "load")
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=HERE / "results-server.md")
    given = parser.parse_args()
    before, counts, rows = os.getloadavg()[0], Counter[str](), {}
    if "ready" in given.parts:
        rows |= ready()
    if "latency" in given.parts:
        rows |= latency(given.rounds)
    if "load" in given.parts:
        rows |= load(given.minutes, given.clients, counts)
    page = [
        "# pumice serve, with the bundled model",
        "",
        f"Made by `python bench/server.py`: pumice {pumice_version()}. {processor()};",
        f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after. Medians (least–most).",
        "",
        "| what | found |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    given.output.write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))
    sys.exit(1 if counts["lost"] or counts["wrong"] or counts["held"] else 0)


def pumice_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("pumice")


if __name__ == "__main__":
    main()
