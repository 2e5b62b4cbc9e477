"""What a user holds: a loaded model that is asked about images. The flow from a question to its answer is `_open`."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pumice import checkpoints, prompt, store
from pumice.config import ImageConfig, LlavaConfig, VisionConfig
from pumice.engine import Request, Run, Sampling, Step
from pumice.errors import UserError, nearest
from pumice.image import ImageLike, Prepared, prepare
from pumice.network.llava import Llava
from pumice.prompt import Message, Part
from pumice.tokenizer import Encoded, StopText, Tokenizer

Images = ImageLike | Sequence[ImageLike] | None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS_AT_ONCE = 8
"""How many questions `ask_all` answers side by side."""


@dataclass(frozen=True)
class Exchange:
    """An earlier turn of a conversation."""

    prompt: str
    answer: str
    images: tuple[ImageLike, ...] = ()


@dataclass(frozen=True)
class Question:
    """One request, whole. `system` None is the template's own text; `raw` sends the prompt as it stands, with
    `<image>` where each image goes."""

    prompt: str
    image: Images = None
    system: str | None = None
    history: tuple[Exchange, ...] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    raw: bool = False

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """All images, in the order in which the prompt shows them."""
        earlier = [image for exchange in self.history for image in exchange.images]
        return (*earlier, *_listed(self.image))


@dataclass(frozen=True)
class Timings:
    """Seconds of each phase, and the rate of the decode steps."""

    encode_s: float
    """Reading the images and running the vision tower."""
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    """New tokens after the first, which the prefill gave."""

    @property
    def tokens_per_s(self) -> float:
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def total_s(self) -> float:
        return self.encode_s + self.prefill_s + self.decode_s


@dataclass(frozen=True)
class Answer:
    """The text, and how it came about. `str(answer)` is the text."""

    text: str
    tokens: tuple[int, ...]
    """New token ids, the end token included when it came."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    """Length of the prompt, image tokens included."""
    image_tokens: tuple[int, ...]
    """Tokens of each image."""
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Seen:
    """What the model really sees of a question: the prompt in parts, its ids, the images as pixels."""

    parts: list[Part]
    encoded: Encoded
    images: list[Prepared]


class Model:
    """A loaded checkpoint. Made by `load`."""

    def __init__(self, name: str, config: LlavaConfig, tokenizer: Tokenizer, network: Llava) -> None:
        self.name, self.config, self.tokenizer, self.network = name, config, tokenizer, network

    def ask(
        self,
        prompt: str,
        image: Images = None,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        raw: bool = False,
    ) -> Answer:
        """The answer to one question. Raises UserError for what is wrong with the question or an image."""
        return self.answer(Question(prompt, image, system, sampling=sampling or Sampling(), raw=raw))

    def stream(
        self,
        prompt: str,
        image: Images = None,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        raw: bool = False,
    ) -> Stream:
        """The same answer in pieces, as they come."""
        return Stream(self, Question(prompt, image, system, sampling=sampling or Sampling(), raw=raw))

    def answer(self, question: Question) -> Answer:
        """The answer to a whole question: history, system text and settings are in it."""
        return Stream(self, question).answer

    def chat(self, *, system: str | None = None, sampling: Sampling | None = None) -> Chat:
        """A conversation that remembers its turns."""
        return Chat(self, system, sampling or Sampling())

    def ask_all(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers in the order of the questions; each is what `answer` would give."""
        answers: list[Answer] = []
        for start in range(0, len(questions), ROWS_AT_ONCE):
            group = questions[start : start + ROWS_AT_ONCE]
            opened = [self._open(question) for question in group]
            run = Run(self.network, [each.request for each in opened])
            for step in itertools.chain.from_iterable(iter(run.step, [])):
                opened[step.row].push(step)
                if opened[step.row].stopped:
                    run.cancel(step.row)
            answers.extend(each.answer() for each in opened)
        return answers

    def generate(self, ids: Sequence[int], images: Images = None, *, sampling: Sampling | None = None) -> list[int]:
        """New token ids after a prompt of ids, in which each image's tokens stand expanded (`see` gives such ids)."""
        seen = [prepare(each, *self._eyes()) for each in _listed(images)]
        request = Request(list(ids), self._features(seen), sampling or Sampling())
        expected, given = sum(each.grid.tokens for each in seen), list(ids).count(self.config.image_token_id)
        if expected != given:
            raise UserError(
                f"the prompt holds {given} image tokens, the {len(seen)} images have {expected}",
                hint="repeat the image token once for each token of each image, as `see` does",
            )
        self._check_length(len(request.ids))
        run = Run(self.network, [request])
        return [step.token for step in itertools.chain.from_iterable(iter(run.step, []))]

    def see(self, question: Question) -> Seen:
        """The exact prompt of a question and its images, without running the network."""
        images = [prepare(each, *self._eyes()) for each in question.images]
        parts = self._parts(question)
        given = sum(part.kind == "image" for part in parts)
        if given != len(images):
            raise UserError(
                f"the prompt has {given} <image> marks, and {len(images)} images came with it",
                hint="a raw prompt needs one <image> for each image, in their order",
            )
        encode = self.tokenizer.encode_raw if question.raw else self.tokenizer.encode
        encoded = encode(parts, [each.grid.tokens for each in images], image_id=self.config.image_token_id)
        self._check_length(len(encoded.ids))
        return Seen(parts, encoded, images)

    def _open(self, question: Question) -> _Opened:
        started = time.perf_counter()
        seen = self.see(question)
        request = Request(seen.encoded.ids, self._features(seen.images), question.sampling)
        stops = (*question.sampling.stop, *([] if question.raw else prompt.TEMPLATES[self.config.template].stop))
        return _Opened(self.tokenizer, request, seen, stops, time.perf_counter() - started)

    def _parts(self, question: Question) -> list[Part]:
        if question.raw:
            if question.history or question.system is not None:
                raise UserError(
                    "a raw prompt came with a system text or earlier turns",
                    hint="write them into the prompt, which is sent as it stands",
                )
            return prompt.split_raw(question.prompt)
        messages = [] if question.system is None else [Message("system", question.system)]
        for turn in question.history:
            messages += [Message("user", turn.prompt, len(turn.images)), Message("assistant", turn.answer)]
        messages.append(Message("user", question.prompt, len(_listed(question.image))))
        return prompt.render(self.config.template, messages)

    def _features(self, images: Sequence[Prepared]) -> list[torch.Tensor]:
        if not images:
            return []
        like = self.network.language_model.embed_tokens.weight
        with torch.inference_mode():
            pixels = torch.cat([torch.from_numpy(each.pixels) for each in images]).to(like.device, like.dtype)
            return self.network.encode(pixels, [each.grid for each in images])

    def _eyes(self) -> tuple[ImageConfig, VisionConfig]:
        if self.config.image is None or self.config.vision is None:
            raise UserError(
                f"{self.name} is a text model: it has no vision tower, so it cannot look at an image",
                hint="ask without an image, or load a LLaVA checkpoint",
            )
        return self.config.image, self.config.vision

    def _check_length(self, tokens: int) -> None:
        limit = self.config.text.max_positions
        if tokens >= limit:
            raise UserError(
                f"the prompt is {tokens} tokens long, images included; {self.name} has {limit} positions",
                hint="send fewer or smaller images, fewer turns or less text",
            )


class _Opened:
    """One question under way: its request, and its answer as far as it has come."""

    def __init__(
        self, tokenizer: Tokenizer, request: Request, seen: Seen, stops: Sequence[str], encode_s: float
    ) -> None:
        self.request, self._seen, self._encode_s = request, seen, encode_s
        self._text, self._stops = tokenizer.stream(), StopText(stops)
        self._steps: list[Step] = []
        self._pieces: list[str] = []
        self._held = ""
        self.stopped = False

    def push(self, step: Step) -> str:
        """The text that this token completes; often a word, sometimes nothing yet."""
        self._steps.append(step)
        text = self._text.push(step.token)
        if step.reason is not None:
            text += self._text.finish()
        emitted, self.stopped = self._stops.push(text)
        if step.reason is not None and not self.stopped:
            emitted += self._stops.finish()
        return self._trimmed(emitted)

    def _trimmed(self, text: str) -> str:
        """Text without the answer's outer white space: at the end it is held back until something follows it."""
        text = self._held + text
        if not self._pieces:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :] if kept or self._pieces else ""
        if kept:
            self._pieces.append(kept)
        return kept

    def answer(self) -> Answer:
        prefill_s = sum(step.seconds for step in self._steps if step.prefill)
        decode_s = sum(step.seconds for step in self._steps if not step.prefill)
        return Answer(
            text="".join(self._pieces),
            tokens=tuple(step.token for step in self._steps),
            finish_reason="stop" if self.stopped or self._steps[-1].reason == "stop" else "length",
            prompt_tokens=len(self.request.ids),
            image_tokens=tuple(each.grid.tokens for each in self._seen.images),
            timings=Timings(self._encode_s, prefill_s, decode_s, sum(not step.prefill for step in self._steps)),
        )


class Stream:
    """An answer that is coming: iterate over its pieces; `answer` is the whole, finished first if it must be."""

    def __init__(self, model: Model, question: Question) -> None:
        self._opened = model._open(question)
        self._pieces = self._run(model)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        for _ in self._pieces:
            pass
        return self._opened.answer()

    def _run(self, model: Model) -> Iterator[str]:
        run = Run(model.network, [self._opened.request])
        for step in itertools.chain.from_iterable(iter(run.step, [])):
            piece = self._opened.push(step)
            if piece:
                yield piece
            if self._opened.stopped:
                return


class Chat:
    """A conversation with one model. `history` is what has been said."""

    def __init__(self, model: Model, system: str | None, sampling: Sampling) -> None:
        self._model, self._system, self._sampling = model, system, sampling
        self.history: tuple[Exchange, ...] = ()

    def ask(self, prompt: str, image: Images = None) -> Answer:
        """The answer to the next turn, which then belongs to the history."""
        turn = self.stream(prompt, image)
        for _ in turn:
            pass
        return turn.answer

    def stream(self, prompt: str, image: Images = None) -> ChatStream:
        """The next answer in pieces; the turn belongs to the history once it has been read to its end."""
        question = Question(prompt, image, self._system, self.history, self._sampling)
        return ChatStream(self, self._model, question)

    def clear(self) -> None:
        """Forget all turns."""
        self.history = ()


class ChatStream(Stream):
    """A stream that adds its turn to the chat's history when it ends."""

    def __init__(self, chat: Chat, model: Model, question: Question) -> None:
        self._chat, self._question = chat, question
        super().__init__(model, question)

    def _run(self, model: Model) -> Iterator[str]:
        yield from super()._run(model)
        turn = Exchange(self._question.prompt, self._opened.answer().text, _listed(self._question.image))
        self._chat.history = (*self._chat.history, turn)


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    template: str | None = None,
    preprocess: Literal["hf", "original"] | None = None,
    beside: Sequence[str | Path] = (),
) -> Model:
    """A model, ready to be asked.

    name: a folder in Hugging Face's or the LLaVA authors' format, or a bundled model (`pebble`, `pebble:1.5`).
    dtype: float32, bfloat16 or float16; None keeps the checkpoint's. device: None takes a GPU when there is one.
    template: a prompt template's name instead of the checkpoint's own. preprocess: `hf` or `original`, whose rules
    images follow instead of the checkpoint's. beside: other folders that the checkpoint needs: the CLIP tower of an
    authors' 1.5 folder, the language model under a LoRA or a lone projector; each is known by its own config.json.

    Raises UserError: no such model, files damaged or incomplete, an architecture that pumice does not have.
    """
    path = store.resolve(name)
    base, tower = checkpoints.companions([Path(each) for each in beside])
    checkpoint = checkpoints.read(path, base=base, tower=tower, template=template)
    config = checkpoint.config
    if preprocess is not None and config.image is not None:
        config = dataclasses.replace(config, image=config.image.under(preprocess))
    network = _network(checkpoint.tensors, config, _dtype(dtype), _device(device))
    return Model(str(name), config, checkpoint.tokenizer, network)


def _network(
    tensors: checkpoints.Tensors, config: LlavaConfig, dtype: torch.dtype | None, device: torch.device
) -> Llava:
    """The modules around the checkpoint's own memory: a tensor is copied only when its type or device must change."""
    with torch.device("meta"):
        network = Llava(config)
    dtype = dtype or tensors.dtype("language_model.embed_tokens.weight")
    state = {name: tensors[name].to(device, dtype) for name in network.state_dict()}
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", hint=nearest(dtype, DTYPES))
    return DTYPES[dtype]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"this machine has no device {str(device)!r}", hint="give cpu, or leave the choice to pumice"
        ) from error
    return chosen


def _listed(image: Images) -> tuple[ImageLike, ...]:
    """One image, several or none, as a tuple."""
    if image is None:
        return ()
    return tuple(image) if isinstance(image, list | tuple) else (image,)  # type: ignore[arg-type]
