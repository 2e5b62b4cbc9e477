"""What a client asks, whichever API it speaks: `Asked`, and the question that a model makes of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from pumice.go_template import Template, read_template
from pumice.ollama_prompt import Turn, render_insert
from pumice.options import Options
from pumice.server.wire import Refused

if TYPE_CHECKING:
    from pumice.config import LlavaConfig
    from pumice.engine.form import Form
    from pumice.model import Model
    from pumice.question import Question, Seen

KEPT_CONTEXTS = 128
KEPT_BYTES = 256 * 2**20
"""Of pictures of earlier answers, for clients that send `context`."""
KNOWN = "pumice.known"
"""In the scope of a request with a `context`: the `Known` of it, where another process gave it."""
LEAST_WITH_EYES = 2048
"""Tokens of context of a model that sees, as in Ollama."""


@dataclass(frozen=True)
class Asked:
    """One request for an answer. `turns` and their `images` are a dialogue; `raw` is a prompt that stands as it is.

    options: Ollama's, over those of the model. format: "json", a JSON schema, or the arguments of `Form.of` by name
    (`{"regex": …}`) under the key `form`. truncate: a dialogue that is too long loses its oldest turns, not the last.
    context: token ids of an earlier answer, which go before; known: the conversation that they stand for, where it was
    found already.
    """

    turns: tuple[Turn, ...] = ()
    images: tuple[bytes, ...] = ()
    raw: str | None = None
    suffix: str = ""
    template: str = ""
    tools: Sequence[Mapping[str, object]] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    format: str | Mapping[str, Any] | None = None
    form: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    image_tokens: int | None = None
    truncate: bool = True
    context: tuple[int, ...] = ()
    known: Known | None = None


class Ready(NamedTuple):
    """A question, what the model sees of it, and the dialogue without what was cut."""

    question: Question
    seen: Seen
    asked: Asked


def ready(asked: Asked, model: Model, contexts: Contexts, context: int | None = None) -> Ready:
    """The question that a model makes of a request. Takes as long as its pictures take to be read.

    context: tokens beyond which a dialogue loses its oldest turns, where neither the request nor the model names a
    number. Raises UserError for what is wrong with it, Refused where the model cannot do it.
    """
    if asked.context and (known := asked.known or contexts.find(asked.context)):
        turns, images = (*known.turns, *asked.turns), (*known.images, *asked.images)
        asked = replace(asked, turns=turns, images=images, context=(), known=None)
    from pumice.question import TooLong

    options = Options().updated(model.dressing.parameters)[0].updated(asked.options)[0]
    window = window_of(model.config, options.num_ctx or context)
    question = _question(asked, model, options)
    while True:
        shorter = _shorter(asked) if asked.truncate else None
        try:
            seen = model.see(question)
            if shorter is None or len(seen.encoded.ids) < window:
                return Ready(question, seen, asked)
        except TooLong:
            if shorter is None:
                raise
        asked, question = shorter, _question(shorter, model, options)


def window_of(config: LlavaConfig, wanted: int | None) -> int:
    """So many tokens a dialogue may have before its oldest turns go; pictures need room, whatever is wanted."""
    most = config.text.max_positions
    return most if wanted is None else min(most, max(wanted, 1 if config.image is None else LEAST_WITH_EYES))


def _question(asked: Asked, model: Model, options: Options) -> Question:
    from pumice.dialogue import Dialogue
    from pumice.engine import Sampling
    from pumice.question import Question
    from pumice.sampling_options import sampling

    positions = model.config.text.max_positions
    drawn, _ = sampling(options, context=positions)
    drawn = replace(drawn, logprobs=asked.logprobs, logit_bias=asked.logit_bias)
    assert isinstance(drawn, Sampling)
    form = _form(asked)
    if form is not None:
        drawn = replace(drawn, stop=())  # a form ends by itself
    raw = asked.raw
    if asked.suffix:
        raw = str(render_insert(_insert(model), asked.turns[-1].content, asked.suffix))
    elif asked.context:
        # Of a conversation that is not known here any more, its text is left.
        before = model.tokenizer.decode([each for each in asked.context if model.config.strange_id([each]) is None])
        raw = before + _text(Dialogue(asked.turns), model)
    if raw is not None:
        return Question(
            _with_marks(raw, len(asked.images)), asked.images, None, (), drawn, True, asked.image_tokens, form
        )
    template = read_template(asked.template) if asked.template else None
    dialogue = Dialogue(asked.turns, template, asked.tools)
    return Question("", asked.images, None, (), drawn, False, asked.image_tokens, form, dialogue)


def _form(asked: Asked) -> Form | None:
    from pumice.engine.form import Form

    if form := asked.form:
        return Form.of(
            schema=form.get("schema"),
            choices=form.get("choices"),
            regex=form.get("regex"),
            grammar=form.get("grammar"),
            closed=True,
        )
    if asked.format in (None, ""):
        return None
    return Form.of(schema={"type": "object"} if asked.format == "json" else asked.format, closed=True)


def _insert(model: Model) -> Template:
    template = model.dressing.template
    if template is None or "suffix" not in template.names:
        raise Refused(400, f"{model.name} does not support insert")
    return template


def _text(dialogue: Any, model: Model) -> str:
    """As it goes on: without the turns that a model has in front."""
    from pumice.dialogue import rendered

    return str(rendered(dialogue, replace(model.dressing, turns=()), model.config.template))


def _with_marks(text: str, images: int) -> str:
    """A raw prompt in which Ollama's marks for images, `[img-0]`, are pumice's; without any they stand in front."""
    marks = [f"[img-{number}]" for number in range(images)]
    if not any(mark in text for mark in marks):
        return "".join("<image>\n" for _ in marks) + text
    for mark in marks:
        text = text.replace(mark, "<image>", 1)
    return text


def _shorter(asked: Asked) -> Asked | None:
    """Without its oldest turn that is no system text; None where only the last is left."""
    for place, turn in enumerate(asked.turns[:-1]):
        if turn.role != "system":
            first = sum(each.images for each in asked.turns[:place])
            images = asked.images[:first] + asked.images[first + turn.images :]
            return replace(asked, turns=asked.turns[:place] + asked.turns[place + 1 :], images=images)
    return None


class Known(NamedTuple):
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]


class Contexts:
    """Conversations by the token ids that a client got for them (`context`), pictures and all: the ids of a picture say
    nothing of it. The last few are kept."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], Known] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def keep(self, ids: Sequence[int], asked: Asked, answer: str) -> None:
        known = Known((*asked.turns, Turn("assistant", answer)), asked.images)
        with self._lock:
            self._drop(tuple(ids))
            self._known[tuple(ids)] = known
            self._bytes += sum(map(len, known.images))
            while len(self._known) > KEPT_CONTEXTS or (self._bytes > KEPT_BYTES and len(self._known) > 1):
                self._drop(next(iter(self._known)))

    def find(self, ids: tuple[int, ...]) -> Known | None:
        with self._lock:
            return self._known.get(ids)

    def _drop(self, ids: tuple[int, ...]) -> None:
        if known := self._known.pop(ids, None):
            self._bytes -= sum(map(len, known.images))


def context_ids(seen: Seen, tokens: Sequence[int], image_id: int | None) -> list[int]:
    """What a client gets as `context`: prompt and answer, without the places of pictures."""
    return [*(each for each in seen.encoded.ids if each != image_id), *tokens]
