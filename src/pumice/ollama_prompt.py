"""A conversation through an Ollama model's own template: messages to parts, as Ollama's server makes the text.

Where the words of a part come from decides what they are. What the template wrote is searched for special tokens; what
came with a message is text, whatever it says, `[img-0]` and `<|im_start|>` included. A picture is never written into a
text: while the template runs it is half of a character pair, which no text of a person holds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pumice.errors import UserError
from pumice.go_template import Budget, Own, Template, Value
from pumice.go_template.values import Record, check, check_text
from pumice.ollama_tools import calls_of, tools_of
from pumice.prompt import SPECIAL_WORDS, TEMPLATES, Part

WORDS = (*SPECIAL_WORDS, "[INST]", "[/INST]")
"""What a template may write as a special token. Where a vocabulary has no such token it is text again."""

PLACE = "[img]"
"""Where a picture goes in the words of its message, for those who write it."""

MAX_IMAGES = 1024
_MARKS = 0xD800
"""The first half of a pair stands for image 0, the next for image 1."""

Placement = Literal["reference", "ollama"]


@dataclass(frozen=True)
class Turn:
    """A message as Ollama's API has it. `images` is how many came with it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: int = 0
    thinking: str = ""
    tool_calls: Sequence[Mapping[str, object]] = ()
    tool_name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True)
class Rendered:
    """A prompt; `images[i]` is the number of the image that stands at its i-th image part, counted over all turns."""

    parts: tuple[Part, ...]
    images: tuple[int, ...]

    def __str__(self) -> str:
        """As Ollama shows it (`_debug_render_only`): pictures as [img-0], [img-1] and so on. To be read only."""
        numbers = iter(self.images)
        return "".join(f"[img-{next(numbers)}]" if part.kind == "image" else part.text for part in self.parts)


def render_turns(
    template: Template,
    turns: Sequence[Turn],
    *,
    tools: Sequence[Mapping[str, object]] = (),
    think: bool | str | None = None,
    placement: Placement = "reference",
    words: Collection[str] = WORDS,
) -> Rendered:
    """The prompt of a conversation; an assistant's turn at its end is the beginning of the answer.

    A template that names `.Messages` runs once. Others know one exchange, and run once for each; the last time they are
    cut behind `.Response`. Both merge neighbours of one role. `think` is what the request says of it, None nothing.

    `placement` "ollama" puts a message's images in front of its words with nothing between, as Ollama's server does;
    "reference" puts each on a line of its own, as LLaVA was trained (LLaVA, preprocess_multimodal), and answers are
    better for it. In both, `[img]` in a message with images is where one of them goes.

    `words` are what the template may write as special tokens. Raises UserError for a message that cannot be, for what
    the template cannot do, and where it leaves out an image.
    """
    merged = _merged(list(_marked(turns, placement)))
    flags: dict[str, Value] = {
        "Think": bool(think),
        "ThinkLevel": think if isinstance(think, str) else "",
        "IsThinkSet": think is not None,
    }
    budget = Budget()
    if "messages" in template.names:
        system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
        messages = tuple(_record(turn) for turn in merged)
        values = {"System": system, "Messages": messages, "Tools": tools_of(tools), "Response": "", **flags}
        pieces = template.run(values, budget)
    else:
        pieces = list(_exchanges(template, merged, flags, budget))
    rendered = _rendered(pieces, words)
    missing = set(range(sum(turn.images for turn in turns))) - set(rendered.images)
    if missing:
        raise UserError(
            f"the model's template leaves out image {min(missing) + 1} of the conversation",
            hint="send images in the user's messages, and no two user's messages around an empty answer",
        )
    return rendered


def render_insert(template: Template, prompt: str, suffix: str, *, words: Collection[str] = WORDS) -> Rendered:
    """The prompt for what stands between two texts. Raises UserError where the template has no `.Suffix`."""
    if "suffix" not in template.names:
        raise UserError("a suffix came, and the model's template has no place for one", hint="ask without a suffix")
    for text, name in ((prompt, "the prompt"), (suffix, "the suffix")):
        check_text(text, name)
    return _rendered(template.run({"Prompt": prompt, "Suffix": suffix, "Response": ""}), words)


@dataclass(frozen=True)
class Worded:
    """One of pumice's own prompt templates in the words of Ollama's layers."""

    template: str
    system: str
    """The text that stands in front where nobody gives another; it may be empty."""
    stops: tuple[str, ...]


def worded(name: str) -> Worded | None:
    """The template of `prompt.TEMPLATES` that has this name, in Go's; None for one that no such text can say: it has
    turns of its own, or none at all, or sets images otherwise.

    One exchange at a time, so the space or the turn's end behind an answer stands between exchanges only. A token that
    begins a prompt is left to the tokenizer, as Ollama leaves it.
    """
    row = TEMPLATES[name]
    if row.example or row.captions or "{images}\n" in row.user:
        return None
    system = f"{{{{ if .System }}}}{row.system_turn.format(text='{{ .System }}')}{{{{ end }}}}"
    asked = row.user.format(system=system, images="", text="{{ .Prompt }}")
    before, _, behind = row.answer.partition("{text}")
    answer = f"{before}{{{{ .Response }}}}{behind}{row.between}"
    if before:
        # Without an answer yet the prompt ends in the header.
        answer = f"{{{{ if .Response }}}}{answer}{{{{ end }}}}"
    opening = "" if "{system}" in row.user else system
    text = f"{opening}{row.user_header}{asked}{row.answer_header}{answer}"
    return Worded(text, row.system or "", (*row.stop, row.end))


def _marked(turns: Sequence[Turn], placement: Placement) -> Iterator[Turn]:
    """The turns with their images in their words, after a look at what came."""
    used = 0
    for number, turn in enumerate(turns, start=1):
        what = f"message {number}"
        if turn.role not in ("system", "user", "assistant", "tool"):
            raise UserError(f"{what} has the role {turn.role!r:.100}", hint="give system, user, assistant or tool")
        for text in (turn.content, turn.thinking, turn.tool_name, turn.tool_call_id):
            check_text(text, what)
        check(turn.tool_calls, what)
        used += turn.images
        if used > MAX_IMAGES:
            raise UserError(f"the conversation has more than {MAX_IMAGES} images", hint="send fewer")
        marks = [chr(_MARKS + index) for index in range(used - turn.images, used)]
        yield replace(turn, content=_placed(turn.content, marks, placement))


def _placed(text: str, marks: Sequence[str], placement: Placement) -> str:
    pieces = text.split(PLACE) if marks else [text]
    inside = min(len(marks), len(pieces) - 1)
    filled = "".join(piece + mark for piece, mark in zip(pieces, marks[:inside]))
    rest = filled + PLACE.join(pieces[inside:])
    front = marks[inside:]
    if placement == "ollama":
        return "".join(front) + rest
    # The authors strip a turn after the image is put in front: no line end without words.
    return "\n".join((*front, rest) if rest else front)


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of one role as one, with a blank line between; the results of tools stay apart."""
    runs: list[list[Turn]] = []
    for turn in turns:
        if runs and runs[-1][0].role == turn.role != "tool":
            runs[-1].append(turn)
        else:
            runs.append([turn])
    return [
        replace(
            run[0],
            content="\n\n".join(turn.content for turn in run),
            images=sum(turn.images for turn in run),
            tool_calls=tuple(call for turn in run for call in turn.tool_calls),
        )
        for run in runs
    ]


def _exchanges(template: Template, turns: Sequence[Turn], flags: Mapping[str, Value], budget: Budget) -> Iterator[str]:
    """A template that knows one exchange: a system text, a prompt and a response."""
    empty = {"System": "", "Prompt": "", "Response": ""}
    # Ollama gave `.First` until 0.1.31; templates of that time write the system text only where it is true.
    held: dict[str, Value] = {**flags, **empty, "First": True}
    names = {"system": "System", "user": "Prompt", "assistant": "Response"}
    ends = {"System": ("Prompt", "Response"), "Prompt": ("Response",), "Response": ()}
    for turn in turns:
        if turn.role == "tool":
            continue
        name = names[turn.role]
        if any(held[each] for each in ends[name]):
            yield from template.run(held, budget)
            held |= {**empty, "First": False}
        held[name] = turn.content
    yield from template.cut.run(held, budget)


def _record(turn: Turn) -> Record:
    """A message as templates know it."""
    calls = calls_of(turn.tool_calls)
    fields: dict[str, Value] = {
        "Role": Own(turn.role),
        "Content": turn.content,
        "Thinking": turn.thinking,
        "Images": tuple(range(turn.images)),
        "ToolCalls": calls,
        "ToolName": turn.tool_name,
        "ToolCallID": turn.tool_call_id,
    }
    source: dict[str, Value] = {"role": turn.role, "content": turn.content}
    more = {"thinking": turn.thinking, "tool_calls": calls, "tool_name": turn.tool_name}
    more |= {"tool_call_id": turn.tool_call_id}
    return Record(fields, source | {name: value for name, value in more.items() if value})


def _rendered(pieces: Sequence[str], words: Collection[str]) -> Rendered:
    """Pieces to parts: special words are looked for in the template's own stretches, images in all others."""
    longest = sorted(filter(None, words), key=len, reverse=True)
    special = re.compile(f"({'|'.join(map(re.escape, longest))})") if longest else None
    parts: list[Part] = []
    images: list[int] = []
    text: list[str] = []

    def close() -> None:
        if text:
            parts.append(Part("text", "".join(text)))
            text.clear()

    for own, stretch in _stretches(pieces):
        cut = special.split(stretch) if own and special else [stretch] if own else _MARK.split(stretch)
        for index, piece in enumerate(cut):
            if index % 2 == 0:
                text += [piece] if piece else []
                continue
            close()
            parts.append(Part("special", piece) if own else Part("image"))
            images += [] if own else [ord(piece) - _MARKS]
    close()
    return Rendered(tuple(parts), tuple(images))


_MARK = re.compile(f"([{chr(_MARKS)}-{chr(_MARKS + MAX_IMAGES - 1)}])")


def _stretches(pieces: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Neighbours of one origin as one: a template may write a special token in several pieces."""
    held: list[str] = []
    for index, piece in enumerate(pieces):
        own = isinstance(piece, Own)
        held.append(piece)
        if index + 1 == len(pieces) or isinstance(pieces[index + 1], Own) != own:
            yield own, "".join(held)
            held = []
