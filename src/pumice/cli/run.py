"""`pumice run`: one question, or a chat."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import options, tokens
from pumice.cli.options import (
    AsJson,
    Beside,
    Device,
    Dtype,
    GpuLayers,
    ImagePaths,
    ImageTokens,
    MaxTokens,
    ModelName,
    Preprocess,
    PromptText,
    Raw,
    System,
    Template,
)
from pumice.cli.terminal import loading
from pumice.errors import UserError

if TYPE_CHECKING:
    from pumice.answer import Answer
    from pumice.engine.form import Form
    from pumice.model import Model
    from pumice.question import Question

Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the best token each time.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from the k best tokens; 0 is off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the best tokens with this much probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the best one.")]
TypicalP = Annotated[float, typer.Option("--typical-p", help="Draw from the most typical tokens; 1 is off.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: less of what was said; 1 is off.")]
Presence = Annotated[float, typer.Option("--presence-penalty", help="Above 0: less of what the answer has; 0 is off.")]
Frequency = Annotated[float, typer.Option("--frequency-penalty", help="Above 0: less of what it has often; 0 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeat for several.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="TOKEN=X", help="Add X to a token's score: 822=-100, ' red=5'; repeat."),
]
LogProbs = Annotated[
    int | None,
    typer.Option("--logprobs", help="Print each token's log-probability and the N likeliest, on stderr.", metavar="N"),
]
Schema = Annotated[
    Path | None, typer.Option("--schema", help="A JSON schema in a file; the answer is JSON that keeps to it.")
]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="A folder that keeps what was read of images for later runs.")
]
ShowTimings = Annotated[bool, typer.Option("--timings", help="Print what took how long, on stderr.")]


def run(
    model: ModelName,
    prompt: PromptText = None,
    image: ImagePaths = None,
    image_tokens: ImageTokens = None,
    system: System = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    typical_p: TypicalP = 1.0,
    repetition_penalty: Penalty = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    max_tokens: MaxTokens = 512,
    logit_bias: LogitBias = None,
    logprobs: LogProbs = None,
    raw: Raw = False,
    template: Template = None,
    preprocess: Preprocess = None,
    beside: Beside = None,
    dtype: Dtype = None,
    device: Device = None,
    gpu_layers: GpuLayers = None,
    schema: Schema = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    timings: ShowTimings = False,
) -> None:
    """Ask a model about images; without a prompt, chat with it.

    pumice run pebble "What does the sign say?" -i sign.png
    """
    text = _prompt(prompt)
    with loading():
        from pumice.engine import Limits, Sampling
        from pumice.model import load_from

        sampling = Sampling(
            temperature, top_k, top_p, min_p, repetition_penalty, seed, stop or (), max_tokens, logprobs=logprobs,
            typical_p=typical_p, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        )  # fmt: skip
        biases = tokens.read_biases(logit_bias or [])
        asked = options.question(text, image or [], system=system, raw=raw) if text is not None else None
        form = _form(schema, asked)
        loaded = load_from(
            options.source(model, template, preprocess, beside), dtype=dtype, device=device, gpu_layers=gpu_layers
        )
        sampling = tokens.biased(sampling, biases, loaded)
        if cache is not None:
            loaded.limit(Limits(cache_dir=cache))
    if asked is None:
        from pumice.cli.chat import talk

        talk(loaded, loaded.chat(system=system, sampling=sampling, image_tokens=image_tokens), image or [])
        return
    asked = dataclasses.replace(asked, sampling=sampling, image_tokens=image_tokens, form=form)
    _tell(loaded, asked, as_json=as_json, timings=timings)


def _form(path: Path | None, asked: Question | None) -> Form | None:
    if path is None:
        return None
    if asked is None:
        raise UserError("--schema came without a prompt", hint="a form is for one answer: give the question as well")
    from pumice.engine.form import Form

    try:
        return Form.of(schema=path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"the schema {path} cannot be read: {why}", hint="name a file with a JSON schema") from error


def _prompt(given: str | None) -> str | None:
    """The prompt, with what is piped in before it; None asks for a chat."""
    if sys.stdin is None or sys.stdin.isatty():
        return given
    piped = sys.stdin.read().strip()
    parts = [part for part in (piped, given) if part]
    if not parts:
        raise UserError(
            "there is no prompt, and no terminal to chat on", hint='give one: pumice run MODEL "What is it?"'
        )
    return "\n".join(parts)


def _tell(model: Model, question: Question, *, as_json: bool, timings: bool) -> None:
    """Print the answer as it comes or as JSON, and what was asked about it."""
    from pumice.conversation import Stream

    stream = Stream(model, question)
    for piece in stream:
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print(json.dumps(described(stream.answer), ensure_ascii=False))
    else:
        print(flush=True)
        tokens.print_likely(stream.answer.logprobs, model.tokenizer)
    if timings:
        print(timing_line(stream.answer), file=sys.stderr)


def described(answer: Answer) -> dict[str, object]:
    """An answer as plain values."""
    seconds = {name: round(value, 4) for name, value in dataclasses.asdict(answer.timings).items()}
    likely = {"logprobs": [tokens.described(each) for each in answer.logprobs]} if answer.logprobs else {}
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "image_tokens": list(answer.image_tokens),
        "tokens": len(answer.tokens),
        "timings": seconds,
        **likely,
    }


def timing_line(answer: Answer) -> str:
    """What took how long, in one line."""
    timings = answer.timings
    return (
        f"images {timings.encode_s:.2f} s, prompt of {answer.prompt_tokens} tokens {timings.prefill_s:.2f} s, "
        f"{len(answer.tokens)} tokens in {timings.decode_s:.2f} s ({timings.tokens_per_s:.1f} tokens/s), "
        f"ended by {answer.finish_reason}"
    )
