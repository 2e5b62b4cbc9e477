"""What a user holds: a loaded model that is asked about images. The flow from a question to its answer is `open`."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pumice import checkpoints, embedding, ops, prompt
from pumice.answer import Answer, Answering, cancel, taken
from pumice.classification import Classification, Labelling, Labels, classified
from pumice.config import LlavaConfig
from pumice.conversation import Chat, Stream
from pumice.dialogue import Dressing
from pumice.embedding import Embeddings
from pumice.engine import PAGE, Engine, Limits, Request, Sampling, position_bytes
from pumice.engine.form import Form
from pumice.errors import UserError, nearest
from pumice.image import ImageLike, Prepared, prepare
from pumice.network.layers import Embedding, Linear, put_matrix
from pumice.network.llava import Llava
from pumice.network.placement import Placement
from pumice.options import Options
from pumice.quant import QTensor
from pumice.question import Images, Prompter, Question, Seen, listed
from pumice.room.fitting import check
from pumice.sampling_options import sampling as sampling_of
from pumice.source import Source
from pumice.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pumice.engine.schema import Grammar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = Options(temperature=0.0, top_k=0, top_p=1.0, num_predict=512)
"""pumice's defaults by Ollama's names."""
FORMS = 32
"""So many compiled forms are kept."""
WAITING = 64
"""So many questions of `ask_all` are under way at a time: their pixels are in memory."""


class Model(Prompter):
    """A loaded checkpoint. Made by `load`."""

    def __init__(
        self, name: str, config: LlavaConfig, tokenizer: Tokenizer, network: Llava, dressing: Dressing | None = None
    ) -> None:
        super().__init__(name, config, tokenizer, dressing)
        self.network = network
        self._grammars: dict[Form, Grammar] = {}
        self._compiling = threading.Lock()
        self._engine: Engine | None = None
        self._starting = threading.Lock()

    def ask(
        self,
        prompt: str,
        image: Images = None,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        raw: bool = False,
        image_tokens: int | None = None,
        schema: Any = None,
    ) -> Answer:
        """The answer to one question; the choices are those of `Question`.

        schema: what the answer must look like: a pydantic model class, a JSON schema, or a `Form`. Raises UserError for
        what is wrong with the question, an image or the schema.
        """
        form, chosen = Form.of(schema=schema), sampling or self.sampling
        return self.answer(Question(prompt, image, system, (), chosen, raw, image_tokens, form))

    def stream(
        self,
        prompt: str,
        image: Images = None,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        raw: bool = False,
        image_tokens: int | None = None,
        schema: Any = None,
    ) -> Stream:
        """The same answer in pieces, as they come."""
        form, chosen = Form.of(schema=schema), sampling or self.sampling
        return Stream(self, Question(prompt, image, system, (), chosen, raw, image_tokens, form))

    def answer(self, question: Question) -> Answer:
        """The answer to a whole question: history, system text and settings are in it."""
        return Stream(self, question).answer

    def chat(
        self, *, system: str | None = None, sampling: Sampling | None = None, image_tokens: int | None = None
    ) -> Chat:
        """A conversation that remembers its turns."""
        self.token_limit(image_tokens)
        return Chat(self, Question("", None, system, sampling=sampling or self.sampling, image_tokens=image_tokens))

    def ask_all(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers in the order of the questions; each is what `answer` would give.

        Raises UserError, with the question's number, for the first that is wrong; answers that came before are lost.
        """
        return self._together(lambda number: self.open(questions[number - 1]), len(questions), "question")

    def answers(self, question: Question, count: int) -> list[Answer]:
        """So many answers to one question, drawn beside each other; the prompt is read once. Where the question has a
        seed, the first answer is drawn by it, and each further one by the next number.

        Raises UserError as `answer` does.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{count!r:.100} answers were asked for", hint="give a whole number from 1")
        seen, seed = self.see(question), question.sampling.seed

        def opened(number: int) -> Answering:
            own = seed if seed is None or number == 1 else (seed + number - 1) % 2**64
            return self.open(replace(question, sampling=replace(question.sampling, seed=own)), seen)

        return self._together(opened, count, "answer")

    def ask_each(self, questions: Iterable[Question]) -> Iterator[Answer | UserError]:
        """The answers one by one, in the order of the questions, which are taken as there is room for them. Where one
        is wrong its error stands in its place, and the others go on."""
        under_way: deque[Answering | UserError] = deque()
        try:
            for question in questions:
                try:
                    answering = self.open(question)
                    answering.start()
                    under_way.append(answering)
                except UserError as error:
                    under_way.append(error)
                if len(under_way) == WAITING:
                    yield taken(under_way)
            while under_way:
                yield taken(under_way)
        finally:
            cancel(under_way)

    def _together(self, opened: Callable[[int], Answering], count: int, what: str) -> list[Answer]:
        """The answers of so many that are opened by their numbers, from 1; `WAITING` are under way at a time."""
        under_way: deque[Answering | UserError] = deque()
        answers: list[Answer] = []

        def take() -> None:
            answer = taken(under_way)
            if isinstance(answer, UserError):
                raise _numbered(f"{what} {len(answers) + 1}", answer) from answer
            answers.append(answer)

        try:
            for number in range(1, count + 1):
                try:
                    answering = opened(number)
                    answering.start()
                except UserError as error:
                    raise _numbered(f"{what} {number}", error) from error
                under_way.append(answering)
                if len(under_way) == WAITING:
                    take()
            while under_way:
                take()
        finally:
            cancel(under_way)
        return answers

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
        engine = self.engine  # `limit` may give the model another
        return [step.token for step in engine.follow(engine.submit(Request(ids, seen, sampling)))]

    @cached_property
    def sampling(self) -> Sampling:
        """How an answer is drawn where nothing else is asked for: pumice's defaults, and over them what the model's
        store says. Raises UserError for what is out of range there."""
        if not self.dressing.parameters:
            return Sampling()
        options, _ = PLAIN.updated(self.dressing.parameters)
        return sampling_of(options, context=self.config.text.max_positions)[0]

    @property
    def engine(self) -> Engine:
        """What answers the questions, all that are asked at the same time together."""
        with self._starting:
            if self._engine is None:
                self._engine = Engine(self.network)
            return self._engine

    def step(self) -> bool:
        """One step of the engine, for who has opened questions and started them. False: it has nothing to do."""
        return self.engine.step()

    @property
    def cache_share(self) -> float:
        """Of the engine's cache, what requests under way hold: 0 to 1."""
        return self.engine.pages_held * PAGE * position_bytes(self.network) / self.engine.cache_bytes

    def limit(self, limits: Limits) -> None:
        """What the engine may take from now on. What it knows of earlier questions is forgotten. Raises UserError for a
        cache folder that cannot be made."""
        with self._starting:
            self._engine = Engine(self.network, limits)

    def open(self, question: Question, seen: Seen | None = None) -> Answering:
        """A question that can be started, for who runs the engine; `answer` and `stream` do so by themselves.

        seen: what `see` gave for it. Raises UserError for what is wrong with it."""
        started = time.perf_counter()
        if question.form is not None and (question.sampling.stop or question.sampling.stop_ids):
            raise UserError(
                "stop texts or tokens came with a form, which they would cut short",
                hint="leave them out: a form ends by itself",
            )
        seen = seen or self.see(question)
        # A form ends by itself, and a stop text of the template might stand in the middle of it.
        own = prompt.TEMPLATES[self.config.template].stop if self.dressing.template is None else ()
        # Who brings a dialogue chooses among the stops of the model's store too.
        own = own if question.dialogue else (*own, *self.dressing.stops)
        stops = question.sampling.stop if question.raw or question.form else (*question.sampling.stop, *own)
        grammar = None if question.form is None else self._grammar(question.form)
        request = Request(seen.encoded.ids, seen.images, question.sampling, grammar)
        return Answering(self.engine, request, seen, self.tokenizer, stops, time.perf_counter() - started)

    def _grammar(self, form: Form) -> Grammar:
        """The form compiled for this vocabulary; the last few are kept."""
        from pumice.engine.schema import compile_form  # its library takes time, and most answers have no form

        with self._compiling:
            if form not in self._grammars:
                self._grammars[form] = compile_form(form, self.tokenizer, self.config.stop_ids)
            grammar = self._grammars[form]
            if len(self._grammars) > FORMS:
                del self._grammars[next(iter(self._grammars))]
        return grammar

    def classify(self, image: Images, labels: Labels | Labelling, *, prompt: str | None = None) -> Classification:
        """How likely each label is for an image: a mapping from the label, the likeliest first, to its probability.

        labels: texts, as the model would answer with them; see `Labels`, and `Labelling` for other choices. prompt:
        what is asked, instead of which of the labels is shown.

        Raises UserError for what is wrong with the labels, the prompt or the image.
        """
        return classified(self, image, Labelling.of(labels, prompt))

    def log_likelihoods(self, question: Question, continuations: Sequence[str]) -> list[list[float]]:
        """How likely the model is to begin its answer with each of these texts: for each of a text's tokens the natural
        logarithm of its probability after the whole prompt and the tokens before it, of the scores in float32. An end
        token is not counted. `written` says how a text becomes tokens, and what is refused.
        """
        seen = self.see(question)
        return self.engine.likelihoods(
            Request([*seen.encoded.ids, *ids[:-1]], seen.images, Sampling(), targets=tuple(ids))
            for ids in self.written(question, seen, continuations)
        )

    def embed(self, texts: Sequence[str], *, truncate: bool = False, normalise: bool = True) -> Embeddings:
        """A vector for each text: the mean of the language model's hidden states behind its final norm, over all of the
        text's tokens, BOS among them where the tokenizer puts one in front. llama.cpp's mean pooling gives the same.

        truncate: of a text that is longer than the model's context only the beginning counts. normalise: to length 1.
        Other threads may ask meanwhile. Raises UserError for what is no text, or too long.
        """
        return embedding.of_texts(self, texts, truncate=truncate, normalise=normalise)

    def embed_images(self, images: Sequence[ImageLike], *, normalise: bool = True) -> Embeddings:
        """A vector for each image: the mean of its features as the language model gets them, behind the projector, the
        vectors at the ends of rows among them (LLaVA 1.6). It is not CLIP's own embedding, whose last layer, norm and
        projection no LLaVA has, and is not comparable with `embed`'s of a text.

        normalise: to length 1. Raises UserError for what is no image, and for a text model.
        """
        return embedding.of_images(self, images, normalise=normalise)

    def features(self, images: Sequence[Prepared]) -> list[torch.Tensor]:
        """What the language model gets of each image: (tokens, width), row ends included."""
        return self.engine.features(images)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], features: Sequence[torch.Tensor], last: int) -> torch.Tensor:
        """Scores over the vocabulary, (last, vocabulary) in float32, of what follows each of the last ids, by the plain
        flow: one pass, nothing kept. `features` stand where the ids are the image token.

        Raises UserError for ids that the model does not have, or too many.
        """
        self.check_ids(ids)
        x_1TD = self.network.embed(torch.tensor([list(ids)], device=self.network.like.device), features)
        return self.network.logits(self.network(x_1TD)[0, -last:]).float()


def _numbered(name: str, error: UserError) -> UserError:
    return UserError(f"{name}: {error.message}", hint=error.hint)


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    template: str | None = None,
    preprocess: Literal["hf", "original"] | None = None,
    mmproj: str | Path | None = None,
    beside: str | Path | Sequence[str | Path] = (),
    gpu_layers: int | None = None,
) -> Model:
    """A model, ready to be asked.

    dtype: float32, bfloat16 or float16; None keeps the checkpoint's. device: None takes a GPU when there is one.
    gpu_layers: so many layers lie on the GPU, the others on the CPU: the head is the first of them, then come the
    language model's blocks, the last first (`Placement.of_layers`); None is all.
    mmproj: the projector file of a GGUF, where it is not the only one in the same folder; a name for what may also
    stand in `beside`. The others are those of `Source`.

    Raises UserError: no such model, files damaged or incomplete, an architecture that pumice does not have,
    a model that does not fit into memory (`room.fitting.verdict`), with settings that would.
    """
    others = (beside,) if isinstance(beside, str | Path) else tuple(beside)
    others = others if mmproj is None else (*others, mmproj)
    return load_from(Source(name, template, preprocess, others), dtype=dtype, device=device, gpu_layers=gpu_layers)


def load_from(
    source: Source,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    gpu_layers: int | None = None,
) -> Model:
    """`load`, from a source that holds its choices."""
    with _uncollected():
        checkpoint = source.checkpoint()
        type_ = chosen_dtype(dtype)
        place = Placement.of_layers(chosen_device(device), checkpoint.config.text.layers, gpu_layers)
        check(checkpoint, type_, place)
        network = assembled(checkpoint.tensors, checkpoint.config, type_, place)
    return Model(str(source.name), checkpoint.config, checkpoint.tokenizer, network, source.dressing())


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside: a vocabulary is hundreds of thousands of objects that all stay, and each collection
    walks them again, with all that PyTorch made."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def use_threads(count: int) -> None:
    """Compute with so many threads on the CPU, in this whole process."""
    torch.set_num_threads(count)


EYES = ("vision_tower.", "multi_modal_projector.")


def assembled(tensors: checkpoints.Tensors, config: LlavaConfig, dtype: torch.dtype | None, place: Placement) -> Llava:
    """The modules around the checkpoint's own memory: a tensor is copied only when its type or device must change."""
    with torch.device("meta"):
        network = Llava(config)
    # Beside a language model in blocks, and unless a type was asked for, the eyes take part in fewer bits.
    in_blocks = tensors.blocks("language_model.layers.0.self_attn.q_proj.weight") is not None
    eyes_narrower = in_blocks and dtype is None and place.device.type == "cpu"
    network.language_model.border = place.border
    for name in network.state_dict():
        device = place.of(name)
        type_ = dtype or tensors.computed_in(device)
        path, _, field = name.rpartition(".")
        module = network.get_submodule(path)
        values = tensors.stored(name)
        if isinstance(values, QTensor) and isinstance(module, Linear | Embedding):
            put_matrix(module, values.to(device, type_))
            continue
        plain = tensors[name]
        if eyes_narrower and name.startswith(EYES) and isinstance(module, Linear) and ops.fits_narrower(plain):
            put_matrix(module, plain)
            module.plain_until_used = tensors.give_back(name)
        else:
            setattr(module, field, nn.Parameter(plain.to(device, type_), requires_grad=False))
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
