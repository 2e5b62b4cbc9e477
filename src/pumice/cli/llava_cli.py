"""`pumice llava-cli`: llama.cpp's command lines for LLaVA, with their prompt rule and the lines that people look for.

Sources of both: llama.cpp, examples/llava/llava-cli.cpp and llava.cpp (to April 2025), llama.cpp's llama_print_timings.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from typing import TYPE_CHECKING

import typer

from pumice.cli.llava_flags import Given, read_flags
from pumice.cli.paths import refuse_mark
from pumice.cli.terminal import loading
from pumice.errors import UserError, shortened
from pumice.prompt import IMAGE_MARK, TEMPLATES

if TYPE_CHECKING:
    from pumice.answer import Answer
    from pumice.model import Model
    from pumice.question import Question, Seen

PROMPT = "describe the image in detail."
SYSTEM = TEMPLATES["llava_v1"].system
"""The system sentence of llava-cli.cpp is the authors' `llava_v1`."""
STOPS = ("</s>", "###", "<|im_end|>", "<|im_start|>", "USER:")
SMALLEST_CONTEXT = 2048
"""llava-cli.cpp raises a smaller -c to this, so scripts give smaller ones."""
THEIR_TEMPLATES = {
    "vicuna": "vicuna_v1",
    "llama2": "llava_llama_2",
    "llama3": "llava_llama_3",
    "mistral-v1": "mistral_instruct",
    "chatml": "chatml_direct",
}
"""Names of llama.cpp's --chat-template, and what LLaVA models of these words were trained on."""

_ESCAPE = re.compile(rb"""\\(?:([nrt'"\\])|x([0-9A-Fa-f]{2}))""")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_ELEMENT = re.compile(r'<img src="(data:image/[^"]*)"\s*/?>')


def llava_cli(context: typer.Context) -> None:
    """Registered with `llava_flags.help_text` as its help; the words come unread, see there."""
    given, notes = read_flags(context.args)
    if given.help:
        print(context.get_help())
        return
    if given.model is None:
        raise UserError(
            "there is no model", hint="give one: pumice llava-cli -m model.gguf --mmproj mmproj.gguf --image photo.jpg"
        )
    for line in notes:
        _say(line)
    started = time.perf_counter()
    with loading():
        asked = question(given)
        model = _loaded(given, raw=asked.raw)
    load_s = time.perf_counter() - started
    seen = model.see(asked)
    _check_context(given, len(seen.encoded.ids), model)
    answer = _tell(model, asked, seen)
    for line in timing_lines(answer, load_s):
        _say(line)


def question(given: Given) -> Question:
    """What is asked, by llama-llava-cli's prompt rule or, where one is named, by a template.

    Raises UserError for a question about nothing, an image in the prompt that does not end, and values that
    `Sampling` refuses.
    """
    from pumice.engine.sampling import Sampling
    from pumice.question import Question

    prompt, images = _embedded(unescaped(given.prompt or "") if given.escape else given.prompt or "")
    if not images:
        images = list(given.images)
    elif given.images:
        _say("--image does not apply: the image inside the prompt is used")
    if not prompt and not images:
        raise UserError("there is no image and no prompt", hint="give --image, -p, or both; `pumice run MODEL` chats")
    prompt = prompt or PROMPT
    raw = given.template is None
    if not raw:
        refuse_mark(prompt, "leave it out: with --chat-template images stand before the text")
    sampling = Sampling(
        max(given.temperature, 0.0), max(given.top_k, 0), given.top_p, given.min_p, given.penalty, given.seed,
        STOPS if raw else (), given.new_tokens, typical_p=given.typical_p, presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty, logit_bias=given.biases,
    )  # fmt: skip
    return Question(literal(prompt, len(images)) if raw else prompt, images, sampling=sampling, raw=raw)


def literal(prompt: str, images: int) -> str:
    """The prompt as llava-cli.cpp, process_prompt, makes it: as it stands where it says where images go."""
    if IMAGE_MARK in prompt:
        return prompt
    return f"{SYSTEM}\nUSER:{IMAGE_MARK * images}{prompt}\nASSISTANT:"


def unescaped(text: str) -> str:
    r"""Backslashes read as llama.cpp reads them: \n, \r, \t, \', \", \\ and \xNN, which is a byte; others stay."""

    def character(found: re.Match[bytes]) -> bytes:
        return _ESCAPED.get(found[1], found[1]) if found[1] else bytes.fromhex(found[2].decode())

    return _ESCAPE.sub(character, text.encode(errors="surrogateescape")).decode(errors="surrogateescape")


def _embedded(prompt: str) -> tuple[str, list[str]]:
    """The prompt without its `<img src="data:image/...">` elements, and what they hold."""
    images = _ELEMENT.findall(prompt)
    text = _ELEMENT.sub("", prompt)
    if '<img src="data:' in text:
        begun = text[text.index('<img src="data:') :]
        raise UserError(
            f"the prompt holds an image that does not end: {shortened(begun)}",
            hint='write <img src="data:image/jpeg;base64,...">, with both quotes',
        )
    return text, images


def _loaded(given: Given, *, raw: bool) -> Model:
    """The model on its device. A raw prompt needs no template, so the file's own is not asked for."""
    from pumice.model import chosen_device, load_from, use_threads
    from pumice.source import Source

    if given.threads > 0:
        use_threads(given.threads)
    template = "plain" if raw else THEIR_TEMPLATES.get(str(given.template), given.template)
    if template != given.template and not raw:
        _say(f"--chat-template {given.template} is {template} here")
    beside = () if given.mmproj is None else (given.mmproj,)
    source = Source(str(given.model), template, beside=beside)
    layers = given.gpu_layers if given.gpu_layers >= 0 else None
    if layers and chosen_device(None).type == "cpu":
        _say(f"-ngl {layers} does not apply: PyTorch finds no GPU here")
        layers = None
    return load_from(source, gpu_layers=layers)


def _check_context(given: Given, prompt_tokens: int, model: Model) -> None:
    """Raises UserError when prompt and answer may not fit into -c."""
    if given.context == 0:
        return
    limit, positions = max(given.context, SMALLEST_CONTEXT), model.config.text.max_positions
    if given.context < limit:
        _say(f"-c {given.context} is raised to {limit}, as llama-llava-cli does")
    if limit > positions:
        _say(f"-c {limit} does not apply: the model has {positions} positions")
    if prompt_tokens + given.new_tokens > limit:
        raise UserError(
            f"-c {limit} is too small: the prompt is {prompt_tokens} tokens long, images included, and -n asks for "
            f"{given.new_tokens} more",
            hint=f"give -c {prompt_tokens + given.new_tokens} or more, or a smaller -n",
        )


def _tell(model: Model, asked: Question, seen: Seen) -> Answer:
    """Print the answer as it comes, after the lines about its images."""
    from pumice.conversation import Stream

    stream = Stream(model, asked, seen)
    pieces = iter(stream)
    first = next(pieces, "")  # behind which the images were looked at
    for line in encode_lines(seen, stream.encode_s * 1e3):
        _say(line)
    for piece in itertools.chain((first,), pieces):
        print(piece, end="", flush=True)
    print(flush=True)
    return stream.answer


def encode_lines(seen: Seen, encode_ms: float) -> list[str]:
    """What llava.cpp says of each image. All views go through the tower together: a view has its share of the time."""
    lines: list[str] = []
    views = sum(image.grid.tiles for image in seen.images)
    for image in seen.images:
        tokens, ms = image.grid.tokens, encode_ms * image.grid.tiles / views
        if image.grid.tiles > 1:
            lines.append(f"{image.grid.tiles} segments encoded in {ms:8.2f} ms")
        lines += [
            f"image embedding created: {tokens} tokens",
            f"image encoded in {ms:8.2f} ms by CLIP ({ms / tokens:8.2f} ms per image patch)",
        ]
    return [f"encode_image_with_clip: {line}" for line in lines]


def timing_lines(answer: Answer, load_s: float) -> list[str]:
    """llama_print_timings' lines. Drawing a token is within its eval time; `total` is all but the loading."""
    timings = answer.timings

    def line(name: str, seconds: float, rest: str = "") -> str:
        return f"llama_print_timings: {name:>16} = {seconds * 1e3:10.2f} ms{rest}"

    def rate(seconds: float, tokens: int, unit: str) -> str:
        each, per_second = seconds * 1e3 / max(tokens, 1), tokens / seconds if seconds else 0.0
        return f" / {tokens:5d} {unit:6} ({each:8.2f} ms per token, {per_second:8.2f} tokens per second)"

    return [
        line("load time", load_s),
        line("prompt eval time", timings.prefill_s, rate(timings.prefill_s, answer.prompt_tokens, "tokens")),
        line("eval time", timings.decode_s, rate(timings.decode_s, timings.decoded_tokens, "runs")),
        line("total time", timings.total_s, f" / {answer.prompt_tokens + timings.decoded_tokens:5d} tokens"),
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
