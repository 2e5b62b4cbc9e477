"""The flags of llama-llava-cli and llama-mtmd-cli: what pumice does with each of them.

Their grammar is not click's: a flag is one whole word, its value is the next word, and in a long name an underscore is
a dash. So -n 32, -ngl 99, -nkvo and -nr stand beside each other, and a value may begin with a dash. Names: llama.cpp
b11434, common/arg.cpp, and examples/llava of 2023 to 2025.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pumice.errors import UserError, nearest, shortened

MAX_THREADS = 512
"""As there (ggml.h, GGML_MAX_N_THREADS)."""
RANDOM_SEED = 2**32 - 1
"""What their -1 becomes."""


@dataclass(frozen=True)
class Given:
    """What a command line says. The numbers are llama-mtmd-cli's defaults; the prompt's and -n's are the old tool's."""

    help: bool = False
    model: str | None = None
    mmproj: str | None = None
    images: tuple[str, ...] = ()
    prompt: str | None = None
    escape: bool = True
    template: str | None = None
    new_tokens: int = 256
    context: int = 0
    """Tokens of prompt and answer together; 0 is as many as the model has positions."""
    gpu_layers: int = -1
    """Negative: as many as there are."""
    threads: int = 0
    """0 leaves the number to PyTorch."""
    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    biases: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their scores."""
    seed: int | None = None


@dataclass(frozen=True)
class Honoured:
    """`reads` makes the field's value of the word after the flag; a flag without one sets it to `reads` itself. Tuples
    of a flag that is repeated are joined."""

    names: str
    field: str
    reads: Callable[[str], object] | bool
    help: str
    value: str = ""


@dataclass(frozen=True)
class Inert:
    """Flags that can change nothing here; `takes`: a value follows, `maybe`: on, off or auto may follow."""

    names: str
    takes: bool
    why: str
    maybe: bool = False


@dataclass(frozen=True)
class Refused:
    """Flags that would change the answer, and cannot."""

    names: str
    why: str
    hint: str


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError
        return number

    return read


def _new_tokens(text: str) -> int:
    """Negative is without end there, and 256 in llama-llava-cli."""
    number = int(text)
    if number == 0:
        raise ValueError
    return number if number > 0 else Given.new_tokens


def _layers(text: str) -> int:
    return Given.gpu_layers if text in ("auto", "all") else int(text)


def _seed(text: str) -> int | None:
    number = _whole(-1, RANDOM_SEED)(text)
    return None if number in (-1, RANDOM_SEED) else number


def _images(text: str) -> tuple[str, ...]:
    """Several with commas between them; a file whose own name holds one is that file."""
    return (text,) if os.path.isfile(text) else tuple(text.split(","))


def _bias(text: str) -> tuple[tuple[int, float], ...]:
    """A token id, a sign and a number. Their infinity, which forbids a token, is the largest bias here."""
    from pumice.engine.sampling import MAX_BIAS

    found = re.fullmatch(r"(\d{1,9})([+-].+)", text)
    if found is None:
        raise ValueError
    bias = float(found[2])
    return ((int(found[1]), math.copysign(MAX_BIAS, bias) if math.isinf(bias) else bias),)


HONOURED = (
    Honoured("-h, --help", "help", True, "Show this and exit."),
    Honoured("-m, --model", "model", str, "A .gguf file, or any other model that `pumice run` takes.", "FILE"),
    Honoured("-mm, --mmproj", "mmproj", str, "The projector; without it the one beside the model.", "FILE"),
    Honoured("--image", "images", _images, "An image; several with commas or by repeating it.", "FILE"),
    Honoured("-p, --prompt", "prompt", str, "What to ask; without it a description in detail.", "TEXT"),
    Honoured("-e, --escape", "escape", True, r"Read \n, \t, \", \\, \xNN in the prompt; this is the default."),
    Honoured("--no-escape", "escape", False, "Take backslashes in the prompt as they are."),
    Honoured("--chat-template", "template", str, "Ask by this template instead of llama-llava-cli's rule.", "NAME"),
    Honoured("-n, --n-predict, --predict", "new_tokens", _new_tokens, "Longest answer in tokens; -1 is 256.", "N"),
    Honoured("-c, --ctx-size", "context", _whole(0, 2**31), "Most tokens of prompt and answer; 0 is no limit.", "N"),
    Honoured(
        "-ngl, --gpu-layers, --n-gpu-layers",
        "gpu_layers",
        _layers,
        "Layers on the GPU: the head, then the last blocks; without it all.",
        "N",
    ),
    Honoured("-t, --threads", "threads", _whole(-1, MAX_THREADS), "Threads of the CPU.", "N"),
    Honoured("--temp, --temperature", "temperature", float, "0 takes the best token each time; without it 0.2.", "X"),
    Honoured("--top-k", "top_k", int, "Draw from the k best tokens; without it 40, 0 is off.", "N"),
    Honoured("--top-p", "top_p", float, "Draw from this much probability; without it 0.95.", "X"),
    Honoured("--min-p", "min_p", float, "Drop tokens below this share of the best; without it 0.05.", "X"),
    Honoured("--typical, --typical-p", "typical_p", float, "Draw from the most typical tokens; 1 is off.", "X"),
    Honoured("--repeat-penalty", "penalty", float, "Above 1: less of what was said.", "X"),
    Honoured("--presence-penalty", "presence_penalty", float, "Above 0: less of what the answer has.", "X"),
    Honoured("--frequency-penalty", "frequency_penalty", float, "Above 0: less of what it has often.", "X"),
    Honoured("-l, --logit-bias", "biases", _bias, "Add to a token's score: 15043+1, 15043-1; repeat.", "ID+X"),
    Honoured("-s, --seed", "seed", _seed, "The same seed gives the same answer; -1 is any.", "N"),
)
INERT = (
    Inert("-b, --batch-size, -ub, --ubatch-size", True, "a prompt is read in one piece"),
    Inert("-tb, --threads-batch", True, "-t counts for prompts too"),
    Inert("-C, --cpu-mask, -Cr, --cpu-range, --cpu-strict, --prio, --poll, --numa", True, "PyTorch places its threads"),
    Inert("-Cb, --cpu-mask-batch, -Crb, --cpu-range-batch, --cpu-strict-batch", True, "PyTorch places its threads"),
    Inert("--prio-batch, --poll-batch", True, "PyTorch places its threads"),
    Inert("--mlock, --mmap, --no-mmap, -dio, --direct-io", False, "weights are mapped from their file"),
    Inert("-lm, --load-mode", True, "weights are mapped from their file"),
    Inert("--repack, -nr, --no-repack, --check-tensors", False, "weights stay as the file has them"),
    Inert("-fa, --flash-attn", False, "attention is PyTorch's", maybe=True),
    Inert("-ctk, --cache-type-k, -ctv, --cache-type-v", True, "keys and values have the type of the computation"),
    Inert("-nkvo, --no-kv-offload, -kvo, --kv-offload", False, "keys and values lie where their layer is"),
    Inert("--keep, -dt, --defrag-thold, -np, --parallel", True, "one question is asked, in one context"),
    Inert("--context-shift, --no-context-shift, --swa-full", False, "one question is asked, in one context"),
    Inert("-sm, --split-mode, -ts, --tensor-split, -mg, --main-gpu, -dev, --device", True, "one GPU is used"),
    Inert("-ot, --override-tensor, -ncmoe, --n-cpu-moe, -mmdev, --mmproj-device", True, "one GPU is used"),
    Inert("--mmproj-offload, --no-mmproj-offload, -cmoe, --cpu-moe", False, "one GPU is used"),
    Inert("--op-offload, --no-op-offload, --no-host", False, "one GPU is used"),
    Inert("-fit, --fit", False, "one GPU is used", maybe=True),
    Inert("-fitt, --fit-target, -fitc, --fit-ctx", True, "one GPU is used"),
    Inert("--warmup, --no-warmup", False, "there is no warm-up"),
    Inert("--jinja, --no-jinja", False, "chat templates of a file are never run"),
    Inert("--image-min-tokens, --image-max-tokens", True, "LLaVA's images have the size that the model fixes"),
    Inert("--log-disable, --log-timestamps, --log-prefix, -v, --verbose, --log-verbose", False, "there is no log"),
    Inert("--no-log-timestamps, --no-log-prefix", False, "there is no log"),
    Inert("--log-file, -lv, --verbosity, --log-verbosity", True, "there is no log"),
    Inert("--perf, --no-perf, --verbose-prompt, --display-prompt, --no-display-prompt", False, "output is fixed"),
    Inert("-co, --color, --log-colors", False, "output is fixed", maybe=True),
    Inert("--simple-io, -no-cnv, --no-conversation", False, "one question is asked, and no more is read"),
    Inert("--offline", False, "pumice never goes online"),
)
REFUSED = (
    Refused(
        "-hf, -hfr, --hf-repo, -hff, --hf-file, -hft, --hf-token, -mu, --model-url, -mmu, --mmproj-url, -dr, "
        "--docker-repo",
        "pumice downloads nothing",
        "fetch the two files first, then give them with -m and --mmproj",
    ),
    Refused("--audio, --video", "LLaVA looks at pictures only", "leave it out, or give pictures with --image"),
    Refused(
        "--samplers, --sampler-seq, --sampling-seq, --repeat-last-n, --top-nsigma, --top-n-sigma, --xtc-probability, "
        "--xtc-threshold, --mirostat, --mirostat-lr, --mirostat-ent, --dynatemp-range, --dynatemp-exp, "
        "--dry-multiplier, --dry-base, --dry-allowed-length, --dry-penalty-last-n, --dry-sequence-breaker, "
        "--ignore-eos, --grammar, --grammar-file, -j, --json-schema, -jf, --json-schema-file",
        "pumice does not draw tokens that way",
        "leave it out; it draws with --temp, --top-k, --top-p, --min-p, --typical, the penalties, -l and -s",
    ),
    Refused(
        "--lora, --lora-scaled, --control-vector, --control-vector-scaled, --override-kv, --rope-scaling, "
        "--rope-scale, --rope-freq-base, --rope-freq-scale, --yarn-orig-ctx, --yarn-ext-factor, --yarn-attn-factor, "
        "--yarn-beta-slow, --yarn-beta-fast, -gan, --grp-attn-n, -gaw, --grp-attn-w",
        "pumice computes what the model's files say",
        "leave it out, or give a model that was made so",
    ),
    Refused(
        "-sys, --system-prompt, -sysf, --system-prompt-file, --chat-template-file",
        "the whole prompt is written in -p",
        "write it into -p, with <image> where the image goes",
    ),
    Refused("--no-mmproj", "the projector beside a model is part of it", "ask without --image"),
    Refused("-f, --file, -bf, --binary-file", "the prompt is a word", 'give -p "$(cat FILE)"'),
    Refused("-cnv, --conversation, -i, --interactive", "one question is answered here", "chat with `pumice run MODEL`"),
)

_FLAGS = MappingProxyType({name: row for row in (*HONOURED, *INERT, *REFUSED) for name in row.names.split(", ")})


def read_flags(words: Sequence[str]) -> tuple[Given, list[str]]:
    """What the words say, and a line for each flag that does not apply. Raises UserError for all else."""
    fields: dict[str, Any] = {}
    notes: list[str] = []
    rest = _Words(words)
    for word in rest:
        name = word.replace("_", "-") if word.startswith("--") else word
        match _FLAGS.get(name):
            case Honoured(field=field, reads=bool(value)):
                fields[field] = value
            case Honoured(field=field, reads=reads) if not isinstance(reads, bool):
                read = _read(name, reads, rest.value_of(name))
                fields[field] = fields.get(field, ()) + read if isinstance(read, tuple) else read
            case Inert() as row:
                said = rest.value_of(name) if row.takes else rest.setting() if row.maybe else ""
                notes.append(f"{f'{name} {said}'.rstrip()} does not apply: {row.why}")
            case Refused(why=why, hint=hint):
                raise UserError(f"{name} cannot be had: {why}", hint=hint)
            case _ if word.startswith("-"):
                raise UserError(f"there is no flag {shortened(word)}", hint=_near(name))
            case _:
                raise UserError(f"{shortened(word)} is no flag", hint="give the prompt with -p, images with --image")
    return Given(**fields), notes


class _Words:
    """The words of a command line, of which a flag takes its value."""

    def __init__(self, words: Sequence[str]) -> None:
        self._left = list(reversed(words))

    def __iter__(self) -> Iterator[str]:
        while self._left:
            yield self._left.pop()

    def value_of(self, name: str) -> str:
        if not self._left:
            raise UserError(f"{name} came without its value", hint=f"give it after {name}, as the next word")
        return self._left.pop()

    def setting(self) -> str:
        """The next word if it is on, off or auto: older builds know the flag without it."""
        return self._left.pop() if self._left and self._left[-1] in ("on", "off", "auto", "1", "0") else ""


def _read(name: str, reads: Callable[[str], object], text: str) -> object:
    try:
        return reads(text)
    except ValueError:
        hint = "`pumice llava-cli -h` says what each flag takes"
        raise UserError(f"{name} is {shortened(text)}, which it cannot be", hint=hint) from None


def _near(name: str) -> str:
    long = [each for each in _FLAGS if each.startswith("--") == name.startswith("--")]
    hint = nearest(name, long)
    return hint if hint.startswith("did") else "`pumice llava-cli -h` lists them all"


def help_text() -> str:
    """The page of `-h`: click leaves a paragraph as it is after its mark."""
    listed = "\n".join(
        textwrap.fill(row.help, 78, initial_indent=f"  {f'{row.names} {row.value}':37} ", subsequent_indent=" " * 40)
        for row in HONOURED
    )
    return "\n\n".join(
        [
            "Ask with the flags of llama-llava-cli and llama-mtmd-cli.",
            "pumice llava-cli -m model.gguf --mmproj mmproj.gguf --image photo.jpg -p 'What is it?'",
            f"\b\nFlags:\n{listed}",
            f"\b\nWithout effect here, as a line on stderr says:\n{_names(INERT)}",
            f"\b\nRefused, because the answer would not be the one that was asked for:\n{_names(REFUSED)}",
        ]
    )


def _names(rows: Sequence[Inert | Refused]) -> str:
    names = ", ".join(row.names for row in rows)
    return textwrap.fill(names, 76, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
