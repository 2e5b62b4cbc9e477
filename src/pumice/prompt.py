"""Messages to the text that a model was trained on, in parts, with the spans that training learns.

A prompt is a list of parts, and only a template makes parts of kind `special` and `image`: what a person writes is a
`text` part whatever it says, so a literal `</s>` or `<image>` stays ordinary characters.

A template is one row of `_TEMPLATES`. Its strings are those of LLaVA's conversation.py, of LLaVA-NeXT's, or (`hf_...`)
of the chat templates in Hugging Face folders, which are never evaluated: `chat_template.py` recognises them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from pumice.errors import UserError, nearest

IMAGE_MARK = "<image>"
"""How a picture is written in a raw prompt, in training files, and where a person reads a prompt."""

SPECIAL_WORDS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
"""What the templates write as special tokens. Text of a person never becomes one of them."""

_SLOT = re.compile(r"\{(system|images|text)\}")
_WORD = re.compile("(" + "|".join(re.escape(word) for word in SPECIAL_WORDS) + r"|\n+)")


@dataclass(frozen=True)
class Message:
    """What one side said. Images stand before the text, as every reference puts them."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: int = 0


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt: `text` is ordinary characters, `special` is the text of one special token, `image` is
    one picture. `learned`: training computes its loss here."""

    kind: Literal["text", "special", "image"]
    text: str = ""
    learned: bool = False


@dataclass(frozen=True)
class Template:
    """A prompt format. A turn is its header and then its body; the assistant's header alone asks for an answer.

    In `user`, `{system}`, `{images}` and `{text}` are filled; in `system_turn` and `answer`, `{text}`.
    """

    name: str
    user: str
    answer: str
    user_header: str = ""
    answer_header: str = ""
    system: str | None = None
    """The template's own system text; None has none, and writes no system turn unless a message brings one."""
    system_turn: str = "{text}"
    system_empty: str | None = None
    """What an empty system text gives; None fills `system_turn` with it."""
    begin: str = ""
    between: str = ""
    """Before each user turn but the first."""
    example: tuple[Message, ...] = ()
    """Built-in turns after the system text."""
    image_end: str = "\n"
    """What follows each picture."""
    empty: Literal["header", "skip", "full"] = "header"
    """What an empty message gives: its header only (LLaVA), nothing (NeXT's Llama 3), a turn like any other (HF)."""
    strips: bool = False
    """Each message loses its outer white space, as Llama 3's own chat template does it."""
    learns_marks: bool = False
    """Training learns the whole assistant turn, and the special tokens and line ends of all turns (NeXT, train.py,
    preprocess_qwen and preprocess_llama3). Otherwise it learns `answer`."""
    captions: bool = False
    """Stage 1: a picture and its caption, without the user's words (LLaVA, train.py, preprocess_plain)."""
    end: str = ""
    """The special token that ends an answer."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer though they are ordinary text."""

    @property
    def answer_space(self) -> str:
        """What a model writes in front of an answer's words: a space where the answers that it learned from have one.
        The line end of `hf_llama3` is none that a model learned: its template is not the one of the training."""
        return " " if self.answer.startswith(" ") else ""


def _assistant(who: str) -> str:
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )


_ABLE = (
    "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_HELPFUL = f"You are a helpful language and vision assistant. You are able to {_ABLE}"
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. "
    f"The assistant is able to {_ABLE}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_ENERGY = (
    Message("user", "What are the key differences between renewable and non-renewable energy sources?"),
    Message(
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
        "finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)

_VICUNA = Template(
    "vicuna_v1",
    system=_assistant("user"),
    system_turn="{text} ",
    user_header="USER:",
    user=" {images}{text} ",
    answer_header="ASSISTANT:",
    answer=" {text}</s>",
    end="</s>",
)
_V0 = Template(
    "llava_v0",
    system=_assistant("human"),
    system_turn="{text}###",
    user_header="Human:",
    user=" {images}{text}###",
    answer_header="Assistant:",
    answer=" {text}###",
    end="</s>",
    stop=("###",),
)
_MISTRAL = Template(
    "mistral_instruct",
    system="",
    system_turn="<<SYS>>\n{text}\n<</SYS>>\n\n",
    system_empty="",
    user="[INST] {system}{images}{text} [/INST]",
    answer=" {text} </s>",
    end="</s>",
)
_CHATML = Template(
    "chatml_direct",
    system="Answer the questions.",
    system_turn="<|im_start|>system\n{text}<|im_end|>",
    system_empty="<|im_end|>",
    user_header="<|im_start|>user\n",
    user="{images}{text}<|im_end|>",
    answer_header="<|im_start|>assistant\n",
    answer="{text}<|im_end|>",
    end="<|im_end|>",
)
_QWEN = replace(
    _CHATML,
    name="qwen_1_5",
    system="You are a helpful assistant.",
    system_turn="<|im_start|>system\n{text}<|im_end|>\n",
    system_empty="",
    user="{images}{text}<|im_end|>\n",
    answer="{text}<|im_end|>\n",
    learns_marks=True,
)
_LLAMA_3 = Template(
    "llava_llama_3",
    begin="<|begin_of_text|>",
    system=_HELPFUL,
    system_turn="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
    user_header="<|start_header_id|>user<|end_header_id|>\n\n",
    user="{images}{text}<|eot_id|>",
    answer_header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{text}<|eot_id|>",
    empty="skip",
    strips=True,
    learns_marks=True,
    end="<|eot_id|>",
)
_PHI_3 = Template(
    "phi3",
    system_turn="<|system|>\n{text}<|end|>\n",
    system_empty="",
    user_header="<|user|>\n",
    user="{images}{text}<|end|>\n",
    answer_header="<|assistant|>\n",
    answer="{text}<|end|>\n",
    empty="full",
    end="<|end|>",
)

_TEMPLATES = (
    _VICUNA,
    replace(_VICUNA, name="llava_v1", system=_assistant("human")),
    replace(_VICUNA, name="v1_mmtag", system=_TAGGED),
    _V0,
    replace(_V0, name="v0", example=_ENERGY),
    replace(_V0, name="v0_mmtag", system=_TAGGED),
    Template("plain", system="", user="{images}{text}\n", answer="{text}\n", captions=True, stop=("\n",)),
    _MISTRAL,
    replace(_MISTRAL, name="llava_llama_2", system=_HELPFUL, between="<s>"),
    _CHATML,
    replace(
        _CHATML,
        name="mpt",
        system="A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
    ),
    _QWEN,
    _LLAMA_3,
    _PHI_3,
    replace(_VICUNA, name="hf_vicuna", system=None, answer=" {text} ", empty="full"),
    replace(
        _MISTRAL,
        name="hf_mistral",
        system=None,
        system_empty=None,
        user="[INST] {images}{text} [/INST]",
        # The file really says <\s>: not a special token, and no model was trained on it. See `chat_template.py`.
        answer=" {text}<\\s> ",
        empty="full",
    ),
    replace(
        _LLAMA_3,
        name="hf_llama3",
        begin="",
        system=None,
        system_turn="<|start_header_id|>system<|end_header_id|>\n\n\n{text}<|eot_id|>",
        image_end="",
        user="{images}\n{text}<|eot_id|>",
        answer="\n{text}<|eot_id|>",
        empty="full",
        strips=False,
        learns_marks=False,
    ),
    replace(_QWEN, name="hf_chatml", system=None, system_empty=None, empty="full", learns_marks=False),
)
_ALIASES = {
    "v1": "vicuna_v1",
    "default": "v0",
    "v0_plain": "plain",
    "mistral_direct": "chatml_direct",
    "qwen_2": "qwen_1_5",
    "llama_3": "llava_llama_3",
}

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {each.name: each for each in _TEMPLATES}
    | {alias: each for alias, name in _ALIASES.items() for each in _TEMPLATES if each.name == name}
)
"""Every name that `render` takes, aliases of the authors included."""


def render(template: str, messages: Sequence[Message]) -> list[Part]:
    """The prompt of a conversation. The assistant's header is appended when the last message is the user's.

    A first message of role `system` replaces the template's system text; an empty one removes it. Raises UserError
    for an unknown template, a system message that is not first, pictures in an answer, or no message at all.
    """
    if template not in TEMPLATES:
        raise UserError(f"there is no prompt template named {template!r}", hint=nearest(template, TEMPLATES))
    row, turns = TEMPLATES[template], list(messages)
    system = turns.pop(0).text if turns and turns[0].role == "system" else row.system
    _check(turns)
    if row.captions and [turn.role for turn in turns] == ["user", "assistant"]:
        pictures = [Part("image")] * turns[0].images
        return [*pictures, *_joined(_filled(row.answer, {"text": [Part("text", turns[1].text)]}, learned=True))]
    if row.captions and any(turn.role == "assistant" and turn.text for turn in turns):
        raise UserError(
            f"the template {row.name!r} has no turns: it takes one question, or one picture and its caption",
            hint="use another template for a conversation, such as 'vicuna_v1'",
        )
    return _joined(_rendered(row, system, turns))


def _check(turns: Sequence[Message]) -> None:
    if not turns:
        raise UserError("a conversation came without a user's message", hint="send at least one message of role user")
    for turn in turns:
        if turn.role == "system":
            raise UserError("a system message came after another message", hint="put it first, and only once")
        if turn.images and turn.role != "user":
            raise UserError("a message that is not the user's came with an image", hint="put it into a user message")


def _rendered(row: Template, system: str | None, turns: Sequence[Message]) -> Iterator[Part]:
    yield from _fixed(row.begin, marks=row.learns_marks)
    opening = list(_system(row, system))
    if "{system}" not in row.user:
        yield from opening
    every = [*row.example, *turns]
    for index, turn in enumerate(every):
        own = turn.role == "assistant"
        content = {"images": _pictures(row, turn), "text": [Part("text", _content(row, turn))], "system": opening}
        if turn.images or content["text"][0].text or row.empty == "full":
            if index and not own:
                yield from _fixed(row.between)
            header = row.answer_header if own else row.user_header
            yield from _fixed(header, learned=own and row.learns_marks, marks=row.learns_marks)
            yield from _filled(row.answer if own else row.user, content, learned=own, marks=row.learns_marks)
            opening = opening if own else []
        elif row.empty == "header":
            yield from _fixed(row.answer_header if own else row.user_header, marks=row.learns_marks)
    if every[-1].role == "user":
        yield from _fixed(row.answer_header, marks=row.learns_marks)


def _system(row: Template, system: str | None) -> Iterator[Part]:
    if system == "" and row.system_empty is not None:
        yield from _fixed(row.system_empty, marks=row.learns_marks)
    elif system is not None:
        text = system.strip() if row.strips else system
        yield from _filled(row.system_turn, {"text": [Part("text", text)]}, marks=row.learns_marks)


def _content(row: Template, turn: Message) -> str:
    if not row.strips:
        return turn.text
    return turn.text.rstrip() if turn.images else turn.text.strip()


def _pictures(row: Template, turn: Message) -> list[Part]:
    parts = [Part("image"), Part("text", row.image_end)] * turn.images
    # The authors strip a turn after the mark is put in front (preprocess_multimodal): no line end without words.
    return parts[:-1] if parts and not _content(row, turn) and row.empty != "full" else parts


def _filled(
    pattern: str, slots: Mapping[str, Sequence[Part]], *, learned: bool = False, marks: bool = False
) -> Iterator[Part]:
    """A template's string with its slots filled; what fills them is never searched for special words."""
    for index, piece in enumerate(_SLOT.split(pattern)):
        if index % 2:
            yield from (replace(part, learned=part.learned or learned) for part in slots[piece])
        else:
            yield from _fixed(piece, learned=learned, marks=marks)


def _fixed(text: str, *, learned: bool = False, marks: bool = False) -> Iterator[Part]:
    """A string of a template, special words as such. `marks`: they and the line ends are learned in any case."""
    for piece in _WORD.split(text):
        special = piece in SPECIAL_WORDS
        yield Part("special" if special else "text", piece, learned or (marks and (special or piece.isspace())))


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Without empty texts, neighbours of one kind of learning made one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and last.kind == part.kind == "text" and last.learned == part.learned:
            joined[-1] = replace(last, text=last.text + part.text)
        elif part.kind != "text" or part.text:
            joined.append(part)
    return joined


def prompt_text(parts: Sequence[Part]) -> str:
    """A prompt as a person reads it, each picture as `<image>`."""
    return "".join(IMAGE_MARK if part.kind == "image" else part.text for part in parts)


def split_raw(text: str) -> list[Part]:
    """A prompt that stands as it is: each `<image>` is a picture, the rest is for `Tokenizer.encode_raw`."""
    parts: list[Part] = []
    for index, piece in enumerate(text.split(IMAGE_MARK)):
        if index:
            parts.append(Part("image"))
        if piece:
            parts.append(Part("text", piece))
    return parts


def messages_from_llava(conversations: Sequence[object], *, has_image: bool) -> list[Message]:
    """The `conversations` of a training sample, as LLaVA's train.py reads them (preprocess_multimodal).

    With an image, the marks of a human turn collapse to one picture in front of its text. A leading answer is dropped,
    as there, and a trailing question, from which nothing can be learned. Without an image, and in answers, `<image>`
    is text. Raises UserError, naming the turn, when one does not hold two texts or is not the other side's.
    """
    turns = [_turn(number, each) for number, each in enumerate(conversations, start=1)]
    if turns and turns[0][1] != "human":
        del turns[0]
    messages: list[Message] = []
    for index, (number, who, text) in enumerate(turns[: len(turns) // 2 * 2]):
        expected = "human" if index % 2 == 0 else "gpt"
        if who != expected:
            raise UserError(
                f"turn {number} of a conversation is from {who!r:.100}, not {expected!r}",
                hint="a training sample alternates between human and gpt, and begins with human",
            )
        if expected == "human" and has_image and IMAGE_MARK in text:
            messages.append(Message("user", text.replace(IMAGE_MARK, "").strip(), images=1))
        else:
            messages.append(Message("user" if expected == "human" else "assistant", text))
    return messages


def _turn(number: int, turn: object) -> tuple[int, str, str]:
    match turn:
        case {"from": str(who), "value": str(text)}:
            return number, who, text
    hint = 'each turn is {"from": "human" or "gpt", "value": its text}'
    raise UserError(f"turn {number} of a conversation is {turn!r:.100}", hint=hint)
