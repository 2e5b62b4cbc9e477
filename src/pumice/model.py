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
from torch import Tensor, nn

from pumice import checkpoints, ops, prompt, store
from pumice.config import LlavaConfig
from pumice.decoding import StopText
from pumice.engine import Request, Run, Sampling, Step, position_bytes
from pumice.errors import UserError, nearest
from pumice.image import Prepared, prepare
from pumice.network.layers import Embedding, Linear, put_matrix
from pumice.network.llava import Llava
from pumice.quant import QTensor
from pumice.question import Exchange, Images, Prompter, Question, Seen, listed
from pumice.room.fitting import check
from pumice.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS_AT_ONCE = 8
"""How many questions `ask_all` answers side by side, at most."""
CACHE_BYTES = 2 * 2**30
"""What their keys and values may take together when they begin; one question may take more."""


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


class Model(Prompter):
    """A loaded checkpoint. Made by `load`."""

    def __init__(self, name: str, config: LlavaConfig, tokenizer: Tokenizer, network: Llava) -> None:
        super().__init__(name, config, tokenizer)
        self.network = network

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
        """The answers in the order of the questions; each is what `answer` would give.

        Raises UserError, with the question's number, for the first that is wrong; answers that came before are lost.
        """
        answers: list[Answer] = []
        group: list[_Opened] = []
        for number, question in enumerate(questions, 1):
            try:
                opened = self._open(question)
            except UserError as error:
                raise UserError(f"question {number}: {error.message}", hint=error.hint) from error
            if group and not self._fit([*group, opened]):
                answers += self._answered(group)
                group = []
            group.append(opened)
        return answers + self._answered(group)

    def _fit(self, group: Sequence[_Opened]) -> bool:
        """Can these be answered side by side?"""
        longest = max(len(each.request.ids) for each in group)
        return len(group) <= ROWS_AT_ONCE and len(group) * longest * position_bytes(self.network) <= CACHE_BYTES

    def _answered(self, group: Sequence[_Opened]) -> list[Answer]:
        run = Run(self.network, [each.request for each in group])
        for step in itertools.chain.from_iterable(iter(run.step, [])):
            group[step.row].push(step)
            if group[step.row].stopped:
                run.cancel(step.row)
        return [each.answer() for each in group]

    def generate(self, ids: Sequence[int], images: Images = None, *, sampling: Sampling | None = None) -> list[int]:
        """New token ids after a prompt of ids, in which each image's tokens stand expanded (`see` gives such ids).

        Raises UserError for ids that the model does not have, images that are not those of the ids, and stop texts,
        which only an answer in words can end with.
        """
        sampling = sampling or Sampling()
        if sampling.stop:
            raise UserError(f"generate came with stop texts {sampling.stop!r}", hint="it gives ids; use ask for text")
        ids = [int(each) for each in ids]
        seen = [prepare(each, *self.eyes()) for each in listed(images)]
        self.check_ids(ids)
        expected, given = sum(each.grid.tokens for each in seen), ids.count(self.config.image_token_id)
        if expected != given:
            raise UserError(
                f"the prompt holds {given} image tokens, the {len(seen)} images have {expected}",
                hint="repeat the image token once for each token of each image, as `see` does",
            )
        run = Run(self.network, [Request(ids, self.features(seen), sampling)])
        return [step.token for step in itertools.chain.from_iterable(iter(run.step, []))]

    def _open(self, question: Question, seen: Seen | None = None) -> _Opened:
        started = time.perf_counter()
        seen = seen or self.see(question)
        request = Request(seen.encoded.ids, self.features(seen.images), question.sampling)
        stops = (*question.sampling.stop, *([] if question.raw else prompt.TEMPLATES[self.config.template].stop))
        return _Opened(self.tokenizer, request, seen, stops, time.perf_counter() - started)

    def features(self, images: Sequence[Prepared]) -> list[torch.Tensor]:
        """What the language model gets of each image: (tokens, width), row ends included."""
        if not images:
            return []
        like = self.network.like
        with torch.inference_mode():
            pixels = torch.cat([torch.from_numpy(each.pixels) for each in images]).to(like.device, like.dtype)
            return self.network.encode(pixels, [each.grid for each in images])

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], features: Sequence[torch.Tensor], last: int) -> torch.Tensor:
        """Scores over the vocabulary, (last, vocabulary) in float32, of what follows each of the last ids, by the plain
        flow: one pass, nothing kept. `features` stand where the ids are the image token.

        Raises UserError for ids that the model does not have, or too many.
        """
        self.check_ids(ids)
        x_1TD = self.network.embed(torch.tensor([list(ids)], device=self.network.like.device), features)
        return self.network.logits(self.network(x_1TD)[0, -last:]).float()


class _Opened:
    """One question under way: its request, and its answer as far as it has come."""

    def __init__(
        self, tokenizer: Tokenizer, request: Request, seen: Seen, stops: Sequence[str], encode_s: float
    ) -> None:
        self.request, self.seen, self._encode_s = request, seen, encode_s
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
        if not self._steps:
            raise UserError("there is no answer: its first token never came", hint="the error before says why")
        prefill_s = sum(step.seconds for step in self._steps if step.prefill)
        decode_s = sum(step.seconds for step in self._steps if not step.prefill)
        return Answer(
            text="".join(self._pieces),
            tokens=tuple(step.token for step in self._steps),
            finish_reason="stop" if self.stopped or self._steps[-1].reason == "stop" else "length",
            prompt_tokens=len(self.request.ids),
            image_tokens=tuple(each.grid.tokens for each in self.seen.images),
            timings=Timings(self._encode_s, prefill_s, decode_s, sum(not step.prefill for step in self._steps)),
        )


class Stream:
    """An answer that is coming: iterate over its pieces; `answer` is the whole, finished first if it must be.

    `seen` is what `see` gave for the question, where that was asked before.
    """

    def __init__(self, model: Model, question: Question, seen: Seen | None = None) -> None:
        self._opened = model._open(question, seen)
        self._pieces = self._run(model)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        for _ in self._pieces:
            pass
        return self._opened.answer()

    @property
    def features(self) -> list[Tensor]:
        """What the language model gets of each image, as `Model.features` says."""
        return self._opened.request.features

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
        new = len(listed(self._question.image))
        images = self._opened.seen.images[-new:] if new else []
        turn = Exchange(self._question.prompt, self._opened.answer().text, tuple(images))
        self._chat.history = (*self._chat.history, turn)


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what is to differ from what its files say.

    name: a folder in Hugging Face's or the LLaVA authors' format, a .gguf file, or a bundled model (`pebble`).
    template: a prompt template's name instead of the checkpoint's own. preprocess: `hf` or `original`, whose rules
    images follow instead of the checkpoint's. beside: what else the checkpoint needs: the CLIP tower of an authors' 1.5
    folder, the language model under a LoRA or a lone projector, the mmproj file of a GGUF; each is known by itself.
    """

    name: str | Path
    template: str | None = None
    preprocess: Literal["hf", "original"] | None = None
    beside: tuple[str | Path, ...] = ()

    def checkpoint(self) -> checkpoints.Checkpoint:
        """The checkpoint with these choices applied, its weights not yet read."""
        beside = [store.resolve(each) for each in self.beside]
        found = checkpoints.read(store.resolve(self.name), beside=beside, template=self.template)
        if self.template is not None:
            found = _ending_with(found, prompt.TEMPLATES[found.config.template].end)
        if self.preprocess is None:
            return found
        if self.preprocess not in ("hf", "original"):
            raise UserError(f"preprocess is {self.preprocess!r}", hint="give hf or original")
        if found.config.image is None:
            raise UserError(
                f"preprocess is {self.preprocess!r}, and {self.name} is a text model",
                hint="leave it out, or load a LLaVA",
            )
        config = dataclasses.replace(found.config, image=found.config.image.under(self.preprocess))
        return dataclasses.replace(found, config=config)


def _ending_with(found: checkpoints.Checkpoint, end: str) -> checkpoints.Checkpoint:
    """The checkpoint with one more end token: that of a template which is not the one it was trained with."""
    token = found.tokenizer.id_of(end) if end else None
    if token is None or token in found.config.stop_ids:
        return found
    stop_ids = (*found.config.stop_ids, token)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, stop_ids=stop_ids))


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    template: str | None = None,
    preprocess: Literal["hf", "original"] | None = None,
    mmproj: str | Path | None = None,
    beside: str | Path | Sequence[str | Path] = (),
) -> Model:
    """A model, ready to be asked.

    dtype: float32, bfloat16 or float16; None keeps the checkpoint's. device: None takes a GPU when there is one.
    mmproj: the projector file of a GGUF, where it is not the only one in the same folder; a name for what may also
    stand in `beside`. The others are those of `Source`.

    Raises UserError: no such model, files damaged or incomplete, an architecture that pumice does not have,
    a model that does not fit into memory (`room.fitting.verdict`), with settings that would.
    """
    others = (beside,) if isinstance(beside, str | Path) else tuple(beside)
    others = others if mmproj is None else (*others, mmproj)
    return load_from(Source(name, template, preprocess, others), dtype=dtype, device=device)


def load_from(
    source: Source, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> Model:
    """`load`, from a source that holds its choices."""
    checkpoint = source.checkpoint()
    type_, place = chosen_dtype(dtype), chosen_device(device)
    check(checkpoint, type_, place)
    network = assembled(checkpoint.tensors, checkpoint.config, type_, place)
    return Model(str(source.name), checkpoint.config, checkpoint.tokenizer, network)


def use_threads(count: int) -> None:
    """Compute with so many threads on the CPU, in this whole process."""
    torch.set_num_threads(count)


EYES = ("vision_tower.", "multi_modal_projector.")


def assembled(
    tensors: checkpoints.Tensors, config: LlavaConfig, dtype: torch.dtype | None, device: torch.device
) -> Llava:
    """The modules around the checkpoint's own memory: a tensor is copied only when its type or device must change."""
    with torch.device("meta"):
        network = Llava(config)
    # Beside a language model in blocks, and unless a type was asked for, the eyes take part in eight bits.
    in_blocks = tensors.blocks("language_model.layers.0.self_attn.q_proj.weight") is not None
    eyes_in_blocks = in_blocks and dtype is None and device.type == "cpu"
    dtype = dtype or tensors.dtype("language_model.embed_tokens.weight")
    for name in network.state_dict():
        path, _, field = name.rpartition(".")
        module = network.get_submodule(path)
        values = tensors.stored(name)
        if isinstance(values, QTensor) and isinstance(module, Linear | Embedding):
            put_matrix(module, values.to(device, dtype))
            continue
        plain = tensors[name]
        if eyes_in_blocks and name.startswith(EYES) and isinstance(module, Linear) and ops.fits_eight_bits(plain):
            put_matrix(module, plain)
            module.in_eight_bits = True
        else:
            setattr(module, field, nn.Parameter(plain.to(device, dtype), requires_grad=False))
    return network.eval()


def chosen_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in (*DTYPES.values(), torch.float64):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}", hint=nearest(str(dtype), DTYPES))
    return DTYPES[dtype]


def chosen_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"this machine has no device {str(device)!r}", hint="give cpu, or leave the choice to pumice"
        ) from error
    return chosen
