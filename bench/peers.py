"""The programs beside each other: each figure comes from a process of its own, whose memory the kernel reports.

A figure is a name and a number: `tokens_per_s`; `encode_s` of one tile; `first_s`, from a loaded model to the first
token; `start_s`, from a process's start to the first token; of it `import_s`, the import of PyTorch, and
`ready_s`, from `load` to the first token; `load_s`; `peak_bytes`, with mapped pages of the files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PHASES = ("prefill-576", "prefill-2880", "decode", "image-1.5", "image-1.6", "start", "features")
QUESTION = "What is it?"
DECODED_TOKENS = 32
LONG_TOKENS = 1000
"""From here on llama-bench runs without its own warm-up, which is as long as the run."""
BEST_SETTINGS = {"llama-bench": ["-ub", "1024", "--repack", "0"], "llama-mtmd-cli": ["-ub", "1024", "-nr"]}
"""What was found to be the fastest beside the defaults."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One shape in one mix, and where everything is."""

    shape: str
    model: Path
    eyes: dict[str, Path]
    """Projector files, by family: 1.5 and 1.6."""
    pictures: dict[str, Path]
    threads: int
    llama_cpp: Path | None = None
    openvino: Path | None = None


@dataclass(frozen=True)
class Done:
    out: str
    err: str
    seconds: float
    first_s: float
    """When the first letter came."""
    peak_bytes: int


def peers(job: Job) -> list[str]:
    """Those that can run here."""
    found = ["pumice"]
    if job.llama_cpp is not None:
        found += ["llama.cpp", "llama.cpp best"]
    if importlib.util.find_spec("transformers"):
        found.append("transformers")
    if job.openvino is not None:
        found.append("openvino")
    return found


def figures(peer: str, phase: str, job: Job) -> Figures:
    """What a peer reaches in a phase; empty where it has no such phase."""
    family = phase.partition("-")[2] if phase.startswith("image") else "1.5"
    match peer:
        case "pumice" if phase == "start":
            return _pumice_start(job)
        case _ if phase == "features" and peer != "pumice":
            return {}
        case "pumice":
            files = [str(job.model), str(job.eyes[family]), str(job.pictures[family])]
            return _child(["pumice", phase, *files], job)
        case "llama.cpp" | "llama.cpp best":
            return _llama_cpp(phase, family, job, best=peer.endswith("best"))
        case "transformers":
            return {} if phase in ("image-1.6", "start") else _child([peer, phase, job.shape], job)
        case "openvino":
            lm_only = phase.startswith("prefill") or phase == "decode"
            return _child([peer, phase, str(job.openvino)], job) if lm_only else {}
    raise ValueError(peer)


def _pumice_start(job: Job) -> Figures:
    """The command line, and what its parts take, each measured in a process of its own."""
    timed = "import time; started = time.perf_counter(); import torch; print(time.perf_counter() - started)"
    imported = _run([sys.executable, "-c", timed], job.threads)
    model, eyes = str(job.model), str(job.eyes["1.5"])
    parts = _child(["pumice", "start", model, eyes, ""], job) | {"import_s": float(imported.out)}
    asked = [QUESTION, "--template", "plain", "--max-tokens", "1"]
    return parts | _whole(_run([sys.executable, "-m", "pumice", "run", model, "--with", eyes, *asked], job.threads))


def _child(arguments: list[str], job: Job) -> Figures:
    done = _run([sys.executable, str(HERE / "measured.py"), *arguments], job.threads)
    found: Figures = json.loads(done.out.splitlines()[-1])
    return found | _peak(done)


def _peak(done: Done) -> Figures:
    return {"peak_bytes": float(done.peak_bytes)}


def _whole(done: Done) -> Figures:
    return _peak(done) | {"start_s": done.first_s}


def _llama_cpp(phase: str, family: str, job: Job, *, best: bool) -> Figures:
    assert job.llama_cpp is not None
    common = ["-m", str(job.model), "-t", str(job.threads)]
    if phase == "start":
        once = ["-p", QUESTION, "-n", "1", "-no-cnv", "--no-warmup", "--no-display-prompt", "--temp", "0"]
        return {} if best else _whole(_run([str(job.llama_cpp / "llama-completion"), *common, *once], job.threads))
    name = "llama-mtmd-cli" if phase.startswith("image") else "llama-bench"
    command = [str(job.llama_cpp / name), *common, *(BEST_SETTINGS[name] if best else [])]
    if name == "llama-bench":
        tokens = 0 if phase == "decode" else int(phase.partition("-")[2])
        lengths = ["-p", str(tokens), "-n", "0" if tokens else str(DECODED_TOKENS), "-r", "1", "-o", "json"]
        done = _run(command + lengths + (["--no-warmup"] if tokens > LONG_TOKENS else []), job.threads)
        return {"tokens_per_s": json.loads(done.out)[0]["avg_ts"]} | _peak(done)
    eyes = ["-mm", str(job.eyes[family]), "--image", str(job.pictures[family]), "-c", "4096"]
    asked = ["-p", QUESTION, "--chat-template", "vicuna", "-n", "1", "--temp", "0"]
    done = _run(command + eyes + asked, job.threads)
    minutes, whole, thousandths = map(int, re.search(r"^(\d+)\.(\d+)\.(\d+)\.\d+ W WARN", done.err, re.M).groups())  # type: ignore[union-attr]
    load_s = minutes * 60 + whole + thousandths / 1000
    tiles = [int(each) / 1000 for each in re.findall(r"encoding done in (\d+) ms", done.err)]
    found = {"load_s": load_s, "first_s": done.first_s - load_s} | _peak(done)
    return found | ({"encode_s": tiles[0]} if family == "1.5" else {})


def _run(command: list[str], threads: int) -> Done:
    """Raises RuntimeError with the program's last words if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles a package; a folder is compiled by its first import
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert process.stdout is not None
        out, first_s = b"", 0.0
        while more := os.read(process.stdout.fileno(), 65536):
            out += more
            if not first_s and out.strip():
                first_s = time.perf_counter() - started
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        process.stdout.close()
        errors.seek(0)
        err = errors.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{err[-2000:]}")
    peak_bytes = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Done(out.decode(errors="replace"), err, seconds, first_s or seconds, peak_bytes)
