"""Many threads ask the bundled model at once, a tenth of it cancelled: is an answer lost or crossed, does memory grow?

    python bench/soak.py [--requests 1000] [--minutes 0] [--threads 24] [--models pebble pebble:1.5]

Requests are drawn from cases whose answers are known: each was asked alone, of an engine that had seen nothing. What
ends must say the same, token by token; what is cancelled, the beginning of it. The cache has room for the longest turn
alone, so that pages are given away and rows lose theirs, which is counted. Ends with 1 if anything was wrong.

Both models answer at the same time, each by its own engine, `--requests` each, and more until `--minutes` are over.
Writes bench/results-soak.md (`--output` names another file); memory is that of the process, each second (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpu import processor
from PIL import Image

import pumice
from pumice import Form, Limits, Question, Sampling
from pumice.engine import Engine
from pumice.model import Model, use_threads

HERE = Path(__file__).resolve().parent
LIMITS = Limits(feature_bytes=2**16, rows=16, chunk=48, alone_chunk=160)
"""Features of one picture at a time."""
CANCELLED = 0.4
"""Chances of a question that is asked by itself. Many have ended before: about a tenth of all are cancelled."""
LONGEST_WAIT_S = 20.0
"""Until a request is cancelled that was to be cancelled later."""
AT_ONCE = 6
"""So many questions are asked together by `ask_all`."""
PICTURES = 12
WORDS = ("pebble", "river", "stone", "amber", "glass", "copper", "silver", "cloud", "ember", "harbour", "lantern")
QUESTIONS = ("What colour is it?", "How many shapes are there?", "Describe the picture.", "Is there a red circle?")
FORMS = (
    Form.of(choices=["red", "green", "blue", "yellow", "purple", "orange", "black"]),
    Form.of(regex="[a-z]{4,9}( [a-z]{4,9}){2}"),
    Form.of(schema={
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }),
)  # fmt: skip
Turn = tuple[str, Image.Image | None]
Said = tuple[tuple[int, ...], str, str]
"""Tokens, text and why it ended."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A conversation of one turn or several, and what is said in it when nobody else asks."""

    turns: tuple[Turn, ...]
    sampling: Sampling
    form: Form | None = None
    expected: tuple[Said, ...] = ()
    positions: int = 0
    """What its longest turn takes."""

    def question(self) -> Question:
        """The first turn."""
        prompt, image = self.turns[0]
        return Question(prompt, image, sampling=self.sampling, form=self.form)

    def conversation(self, model: Model) -> Iterator[pumice.model.Stream]:
        """A stream for each turn, once the one before it was read."""
        chat = model.chat(sampling=self.sampling)
        for prompt, image in self.turns:
            if self.form is None:
                yield chat.stream(prompt, image)
            else:
                yield model.stream(prompt, image, sampling=self.sampling, schema=self.form)


# --- what is asked ----------------------------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    """A few rectangles on a pale ground, of one of four sizes: no two numbers give the same."""
    draw = random.Random(f"picture {number}")
    shown = Image.new("RGB", ((192, 192), (384, 192), (192, 384), (288, 288))[number % 4], (228, 228, 228 + number))
    for _ in range(draw.randint(1, 5)):
        left, top, edge = draw.randrange(150), draw.randrange(150), draw.randint(20, 60)
        shown.paste(tuple(draw.randrange(256) for _ in range(3)), (left, top, left + edge, top + edge))
    return shown


def cases(model: Model, count: int) -> list[Case]:
    """Texts and images, short and long, greedy and drawn, in a form, in several turns, often about one image."""
    pictures = [picture(number) for number in range(PICTURES)]
    goes_on = dict.fromkeys(model.config.stop_ids, -100.0)  # pebble says little, and rows shall grow
    made = []
    for number in range(count):
        draw = random.Random(f"case {number}")
        canary = " ".join(draw.choices(WORDS, k=draw.choice((1, 3, 12, 60))))
        image = draw.choice(pictures) if draw.random() < 0.6 else None
        first = f"{draw.choice(QUESTIONS)} {number}: {canary}."
        sampling = Sampling(
            max_tokens=draw.choice((1, 8, 32, 160, 160)), logit_bias=goes_on if draw.random() < 0.7 else ()
        )
        if draw.random() < 0.3:
            sampling = dataclasses.replace(sampling, temperature=draw.choice((0.5, 1.2)), seed=number, top_p=0.95)
        if draw.random() < 0.2:
            sampling = dataclasses.replace(sampling, repetition_penalty=1.2)
        form = draw.choice(FORMS) if draw.random() < 0.2 else None
        turns: list[Turn] = [(first, image)]
        if form is None and draw.random() < 0.3:
            shown = [draw.choice(pictures) if draw.random() < 0.3 else None for _ in range(draw.randint(1, 3))]
            turns += [(draw.choice(QUESTIONS), each) for each in shown]
        if form is not None:
            sampling = dataclasses.replace(sampling, logit_bias=(), max_tokens=80)
        made.append(Case(tuple(turns), sampling, form))
    return made


def alone(model: Model, case: Case) -> Case:
    """The case with its answers, by an engine that has seen nothing else."""
    model.limit(Limits())
    answers = [stream.answer for stream in case.conversation(model)]
    longest = max(each.prompt_tokens for each in answers) + case.sampling.max_tokens
    return dataclasses.replace(case, expected=tuple(map(said, answers)), positions=longest)


def said(answer: pumice.Answer) -> Said:
    return answer.tokens, answer.text, answer.finish_reason


# --- all at once ------------------------------------------------------------------------------------------------------


class Soak:
    """One model, its cases, and what has happened to requests for them."""

    def __init__(self, model: Model, count: int) -> None:
        self.model, self.name = model, model.name
        self.cases = [alone(model, each) for each in cases(model, count)]
        model._engine = Engine(model.network, LIMITS, max(each.positions for each in self.cases))
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        _watch(model, self.counts)

    def ask(self, draw: random.Random) -> None:
        """One case, or several at once, to their end or until they are cancelled."""
        case = draw.choice(self.cases)
        if draw.random() < 0.1:
            self._together(draw.choices(self.cases, k=AT_ONCE))
        elif draw.random() < 0.2 and case.form is None:
            self._ids(case)
        else:
            self._turns(case, draw)

    def _turns(self, case: Case, draw: random.Random) -> None:
        if draw.random() < CANCELLED / 2:
            self._cancel_from_here(case, draw)
            return
        for expected, stream in zip(case.expected, case.conversation(self.model)):
            if draw.random() < CANCELLED / 2:
                wanted = draw.randint(1, 5)
                pieces = list(itertools.islice(stream, wanted))
                if len(pieces) == wanted:
                    del stream  # nobody holds it: it is cancelled
                    self._begun("".join(pieces), expected, "dropped")
                    return
            self._whole(stream.answer, expected)

    def _cancel_from_here(self, case: Case, draw: random.Random) -> None:
        """Others run the engine, this thread ends the request: at once, while it is read, or after some letters."""
        opened, letters = self.model._open(case.question()), draw.choice((0, 0, 1, 3))
        opened.start()
        late = time.perf_counter() + (LONGEST_WAIT_S if letters else draw.random() * LONGEST_WAIT_S / 20)
        text = ""
        while time.perf_counter() < late and not opened.ended and (not letters or len(text) < letters):
            time.sleep(0.002)
            text += opened.take()
        if opened.ended:
            self._whole(opened.answer(), case.expected[0])
            return
        opened.cancel()
        text += opened.take()
        self._begun(text, case.expected[0], "cancelled in the middle" if text else "cancelled before it began")

    def _together(self, chosen: list[Case]) -> None:
        answers = self.model.ask_all([each.question() for each in chosen])
        for case, answer in zip(chosen, answers):
            self._whole(answer, case.expected[0])

    def _ids(self, case: Case) -> None:
        """The same by ids alone."""
        seen = self.model.see(case.question())
        tokens = self.model.generate(seen.encoded.ids, case.turns[0][1], sampling=case.sampling)
        self._note("by ids", tuple(tokens) == case.expected[0][0], f"{tokens} instead of {case.expected[0][0]}")

    def _whole(self, answer: pumice.Answer, expected: Said) -> None:
        with self._lock:
            self.counts["cached"] += answer.cached_tokens
            self.counts["prompt"] += answer.prompt_tokens
        self._note("whole", said(answer) == expected, f"{said(answer)} instead of {expected}")

    def _begun(self, text: str, expected: Said, how: str) -> None:
        self._note(how, expected[1].startswith(text), f"{text!r}, cancelled, instead of {expected[1]!r}")

    def _note(self, what: str, right: bool, words: str) -> None:
        with self._lock:
            self.counts[what] += 1
            self.counts["requests"] += 1
            if not right:
                self.wrong.append(words)

    def ended(self) -> None:
        """What must be so when nobody asks any more."""
        engine = self.model.engine
        if engine.step():
            self.wrong.append("the engine still had something to do")
        if engine.pages_held or engine._generations or engine._eyes._tiles:
            self.wrong.append(f"{engine.pages_held} pages, {len(engine._generations)} requests and the tiles of "
                              f"{len(engine._eyes._tiles)} images were left")  # fmt: skip


def _watch(model: Model, counts: Counter[str]) -> None:
    """Count the rows that lose their pages, and the pages that are given away though they could be found."""
    scheduler = model.engine._scheduler
    decoding, take = scheduler.decoding, scheduler.cache.take

    def counted_decoding() -> Any:
        before = scheduler.running
        rows = decoding()
        counts["preempted"] += before - scheduler.running
        return rows

    def counted_take() -> int:
        before = scheduler.cache.idle
        page = take()
        counts["evicted"] += before - scheduler.cache.idle
        return page

    scheduler.decoding, scheduler.cache.take = counted_decoding, counted_take  # type: ignore[method-assign]


def run(soaks: Sequence[Soak], requests: int, threads: int, goes_on: Callable[[], bool]) -> None:
    """Until each model had so many requests, and as long as it goes on."""

    def work(seed: int) -> None:
        draw = random.Random(seed)
        while behind := [each for each in soaks if each.counts["requests"] < requests] or (goes_on() and soaks):
            soak = draw.choice(behind)
            try:
                soak.ask(draw)
            except Exception as error:  # whatever it is, the soak reports it
                soak.wrong.append(repr(error))
                return

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()


# --- memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """What the process takes, each second: (seconds, bytes); and what it still takes at the end, when the C library has
    given back what it held free: each thread that computes has memory of its own that is free between passes."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self.kept = 0
        self._over = threading.Event()
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # the GNU C library's
        self.kept = self._taken()

    def _taken(self) -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")

    def _sample(self) -> None:
        while True:
            self.samples.append((time.perf_counter() - self._started, self._taken()))
            if self._over.wait(1.0):
                return

    def rows(self) -> dict[str, str]:
        """Quarters of the time, and the slope of the last three of them: the first fills what is kept."""
        sizes = [size / 1e6 for _, size in self.samples]
        fourth = len(sizes) // 4
        rows = {
            "memory, most, MB": f"{max(sizes):.0f}",
            "memory before, MB": f"{sizes[0]:.0f}",
            "memory behind the end, what is free given back, MB": f"{self.kept / 1e6:.0f}",
        }
        if fourth < 15:
            return rows
        for number, name in enumerate(("first", "second", "third", "last")):
            rows[f"memory, median of the {name} quarter, MB"] = (
                f"{statistics.median(sizes[number * fourth : (number + 1) * fourth]):.1f}"
            )
        hours = [seconds / 3600 for seconds, _ in self.samples]
        slope, _ = statistics.linear_regression(hours[fourth:], sizes[fourth:])
        return rows | {"memory, slope behind the first quarter, MB an hour": f"{slope:.1f}"}


# --- the page ---------------------------------------------------------------------------------------------------------

ROWS = {
    "requests": "requests",
    "whole": "read to their end",
    "by ids": "the same by `generate`",
    "cancelled before it began": "cancelled by another thread, before any text",
    "cancelled in the middle": "cancelled by another thread, in the middle",
    "dropped": "streams dropped in the middle",
    "preempted": "rows that lost their pages and read again",
    "evicted": "pages given away that could be found",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of each model")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=24)
    parser.add_argument("--cases", type=int, default=160, help="of each model, asked alone at first")
    parser.add_argument("--models", nargs="+", default=["pebble", "pebble:1.5"])
    parser.add_argument("--output", type=Path, default=HERE / "results-soak.md")
    chosen = parser.parse_args()
    use_threads(1)  # of so small a network a second takes more than it brings
    # Sums of narrower numbers may be rounded otherwise in company; what is asked here is whether answers are right.
    soaks = [Soak(pumice.load(name, dtype="float32"), chosen.cases) for name in chosen.models]
    print("asked alone", file=sys.stderr)
    started = time.perf_counter()
    with Memory() as memory:
        run(soaks, chosen.requests, chosen.threads, lambda: time.perf_counter() - started < 60 * chosen.minutes)
        for soak in soaks:
            soak.ended()
    text = "\n".join(_page(soaks, memory, chosen.threads, time.perf_counter() - started)) + "\n"
    chosen.output.write_text(text, encoding="utf-8")
    print(text)
    for soak in soaks:
        for words in soak.wrong[:5]:
            print(f"{soak.name}: {words}", file=sys.stderr)
    if any(soak.wrong or not (soak.counts["preempted"] and soak.counts["evicted"]) for soak in soaks):
        sys.exit(1)


def _page(soaks: Sequence[Soak], memory: Memory, threads: int, seconds: float) -> list[str]:
    cells = {what: [f"{soak.counts[name]}" for soak in soaks] for name, what in ROWS.items()}
    cells |= {
        "tokens of prompts found in the cache": [
            f"{soak.counts['cached'] / max(1, soak.counts['prompt']):.0%}" for soak in soaks
        ],
        "of all requests cancelled": [
            f"{1 - (soak.counts['whole'] + soak.counts['by ids']) / max(1, soak.counts['requests']):.1%}"
            for soak in soaks
        ],
        "answers lost, crossed or otherwise wrong": [f"{len(soak.wrong)}" for soak in soaks],
        "pages held at the end": [f"{soak.model.engine.pages_held}" for soak in soaks],
    }
    return [
        f"# The engine under load: {threads} threads, {seconds / 60:.1f} minutes",
        "",
        f"Made by `python bench/soak.py`. {processor()}. The bundled models answer in one process,",
        f"each by its engine, in float32: {len(soaks[0].cases)} conversations of each, which were held alone before.",
        "",
        f"| what | {' | '.join(soak.name for soak in soaks)} |",
        "|---|" + "---|" * len(soaks),
        *(f"| {what} | {' | '.join(values)} |" for what, values in cells.items()),
        "",
        "| both together | figure |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in memory.rows().items()),
    ]


if __name__ == "__main__":
    main()
