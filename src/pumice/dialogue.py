"""A conversation of any turns, and what a model of a store brings for it: its template, its system text, its turns.

Nothing here knows weights: a dialogue becomes the parts of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from pumice import prompt
from pumice.errors import UserError
from pumice.go_template import Template, read_template
from pumice.ollama_prompt import PLACE, Rendered, Turn, render_turns
from pumice.prompt import Message, Part
from pumice.store import Stored


@dataclass(frozen=True)
class Dressing:
    """What a model of a store has of its own beside its weights; all empty for any other."""

    template: Template | None = None
    system: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    """By Ollama's names: see `options`."""
    turns: tuple[Turn, ...] = ()
    """What stands before each conversation."""

    @classmethod
    def of(cls, stored: Stored) -> Dressing:
        """Raises UserError for what is damaged, and a template that cannot be read."""
        text = stored.text("template")
        turns = tuple(Turn(role, content) for role, content in stored.messages())  # type: ignore[arg-type]
        template = None if text is None else read_template(text)
        return cls(template, stored.text("system"), stored.parameters(), turns)

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        found = self.parameters.get("stop", ())
        return (found,) if isinstance(found, str) else tuple(map(str, found)) if isinstance(found, list) else ()


@dataclass(frozen=True)
class Dialogue:
    """Turns as Ollama's and OpenAI's APIs have them: any roles in any order, an answer's beginning at the end.

    template: instead of the model's own. tools: what the model may call, where its template has a place for them.
    """

    turns: tuple[Turn, ...]
    template: Template | None = None
    tools: Sequence[Mapping[str, object]] = ()

    @property
    def continues(self) -> bool:
        """Whether it ends in the beginning of the answer."""
        return bool(self.turns) and self.turns[-1].role == "assistant"


def rendered(dialogue: Dialogue, dressing: Dressing, template: str) -> Rendered:
    """The prompt of a dialogue, through its own template, the model's, or that which pumice has under a name.

    The model's own turns come first, and its system text where the first turn is none. Raises UserError for turns that
    cannot be, and tools that the template has no place for.
    """
    turns = (*dressing.turns, *dialogue.turns)
    if dressing.system and (not dialogue.turns or dialogue.turns[0].role != "system"):
        turns = (Turn("system", dressing.system), *turns)
    own = dialogue.template or dressing.template
    if dialogue.tools and (own is None or "tools" not in own.names):
        raise UserError("tools came, and the model's template has no place for them", hint="ask without tools")
    if own is not None:
        return render_turns(own, turns, tools=dialogue.tools)
    return _in_order(template, turns)


def _in_order(template: str, turns: Sequence[Turn]) -> Rendered:
    """Through a template of `prompt`, which knows one system text and then each side in turn: neighbours of one side
    are one message with a blank line between, all system texts stand first, a tool's result is the user's word."""
    system = [each.content for each in turns if each.role == "system"]
    messages: list[Message] = []
    shown: list[int] = []
    used = 0
    for each in turns:
        numbers = range(used, used + each.images)
        used += each.images
        if each.role == "system":
            if each.images:
                raise UserError("a system message came with an image", hint="put it into a user message")
            continue
        role: Literal["user", "assistant"] = "assistant" if each.role == "assistant" else "user"
        shown += numbers
        # Images stand in front, whatever place was marked for them.
        new = Message(role, each.content.replace(PLACE, "", each.images), each.images)
        if messages and messages[-1].role == role:
            last = messages.pop()
            text = "\n\n".join(filter(None, (last.text, new.text)))
            new = replace(new, text=text, images=last.images + new.images)
        messages.append(new)
    begun = messages.pop() if messages and messages[-1].role == "assistant" else None
    first = [Message("system", "\n\n".join(system))] if system else []
    parts = prompt.render(template, [*first, *messages])
    if begun is not None and begun.text:
        parts.append(Part("text", prompt.TEMPLATES[template].answer_space + begun.text))
    return Rendered(tuple(parts), tuple(shown))
