"""What is asked, and what a model sees of it: the prompt's parts and ids, and the images as pixels. No weights here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pumice import prompt
from pumice.config import ImageConfig, LlavaConfig, VisionConfig
from pumice.dialogue import Dialogue, Dressing, rendered
from pumice.engine.form import Form
from pumice.engine.sampling import Sampling
from pumice.errors import UserError, shortened
from pumice.image import ImageLike, Prepared, prepare, tile_pictures
from pumice.ollama_prompt import Rendered, Turn
from pumice.prompt import Message, Part
from pumice.tokenizer import Encoded, Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

Images = ImageLike | Sequence[ImageLike] | None


@dataclass(frozen=True)
class Exchange:
    """An earlier turn of a conversation. An image that was prepared once is not looked for again: its file may have
    changed or gone since. It keeps the tokens that it had."""

    prompt: str
    answer: str
    images: tuple[ImageLike | Prepared, ...] = ()


@dataclass(frozen=True)
class Question:
    """One request, whole. `system` None is the template's own text; `raw` sends the prompt as it stands, with
    `<image>` where each image goes. `image_tokens` is the most that each image may take (docs/image-tokens.md); None
    keeps all. `form` is what the answer must look like (docs/structured.md). A `dialogue` stands instead of prompt,
    system and history; `image` then holds the images of its turns, in their order."""

    prompt: str
    image: Images = None
    system: str | None = None
    history: tuple[Exchange, ...] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    raw: bool = False
    image_tokens: int | None = None
    form: Form | None = None
    dialogue: Dialogue | None = None

    @property
    def images(self) -> tuple[ImageLike | Prepared, ...]:
        """All images, in the order in which the prompt shows them."""
        earlier = [image for exchange in self.history for image in exchange.images]
        return (*earlier, *listed(self.image))


@dataclass(frozen=True)
class Seen:
    """What the model really sees of a question: the prompt in parts, its ids, the images as pixels."""

    parts: list[Part]
    encoded: Encoded
    images: list[Prepared]
    continues: bool = False
    """The prompt ends in the beginning of the answer."""


class TooLong(UserError):
    """A prompt that leaves no position for an answer."""


class Prompter:
    """A model's words and eyes: everything between a question and the network."""

    def __init__(self, name: str, config: LlavaConfig, tokenizer: Tokenizer, dressing: Dressing | None = None) -> None:
        self.name, self.config, self.tokenizer, self.dressing = name, config, tokenizer, dressing or Dressing()

    def see(self, question: Question) -> Seen:
        """The exact prompt of a question and its images, without running the network.

        Raises UserError for what is wrong with the question or an image.
        """
        for name, text in (("prompt", question.prompt), ("system", question.system or "")):
            if not isinstance(text, str):
                raise UserError(f"{name} is {text!r}", hint="give a text")
        most = self.token_limit(question.image_tokens)
        images = [each if isinstance(each, Prepared) else prepare(each, *self.eyes(), most) for each in question.images]
        shown = self._rendered(question)
        parts = list(shown.parts)
        given = sum(part.kind == "image" for part in parts)
        if given != len(images):
            raise UserError(
                f"the prompt has {given} <image> marks, and {len(images)} images came with it",
                hint="a raw prompt needs one <image> for each image, in their order",
            )
        images = [images[number] for number in shown.images]
        encode = self.tokenizer.encode_raw if question.raw else self.tokenizer.encode
        encoded = encode(parts, [each.grid.tokens for each in images], image_id=self.config.image_token_id)
        self.check_ids(encoded.ids)
        return Seen(parts, encoded, images, question.dialogue is not None and question.dialogue.continues)

    def written(self, question: Question, seen: Seen, texts: Sequence[str]) -> list[list[int]]:
        """The ids with which the model would begin its answer to a question if it wrote each of these texts; no end
        token. `seen` is what `see` gives for the question.

        A text is cut into tokens together with the prompt's last words, as in training, with the template's space in
        front; behind a raw prompt it stands as it is. Where the tokenizer would join the two into one token, the text
        is cut by itself.

        Raises UserError for what is no text, one that has no token, and one that has no room behind the prompt.
        """
        encode = self.tokenizer.encode_raw if question.raw else self.tokenizer.encode
        space = "" if question.raw else prompt.TEMPLATES[self.config.template].answer_space
        cuts = [place for place, part in enumerate(seen.parts) if part.kind != "text"]
        tail = seen.parts[cuts[-1] if cuts else 0 :]  # tokens never reach across a special token or an image
        images = [1] * sum(part.kind == "image" for part in tail)

        def ids(parts: Sequence[Part]) -> list[int]:
            return encode(parts, images, image_id=self.config.image_token_id).ids

        before, room = ids(tail), self.config.text.max_positions - len(seen.encoded.ids)
        found = []
        for text in texts:
            if not isinstance(text, str) or not text:
                raise UserError(f"an answer to be scored is {text!r:.100}", hint="give a text that is not empty")
            both = ids([*tail, Part("text", space + text)])
            joined = both[: len(before)] != before
            found.append(self.tokenizer.continued(space + text) if joined else both[len(before) :])
            if not found[-1]:
                raise UserError(f"the answer {shortened(text)} has no token behind the prompt", hint="give another")
            if len(found[-1]) > room:
                raise UserError(
                    f"the answer {shortened(text)} is {len(found[-1])} tokens long; {self.name} has {room} positions "
                    "behind the prompt, images included",
                    hint="give a shorter one, or send fewer or smaller images",
                )
            self._check_known(f"the answer {shortened(text)}", found[-1])
        return found

    def views(self, question: Question) -> list[list[Image]]:
        """The pictures behind the pixels of a question's own images, as the tower sees them: for each its base view,
        then its tiles."""
        most = self.token_limit(question.image_tokens)
        return [tile_pictures(each, *self.eyes(), most) for each in listed(question.image)]

    def _rendered(self, question: Question) -> Rendered:
        if question.dialogue is not None:
            return rendered(question.dialogue, self.dressing, self.config.template)
        if question.raw:
            if question.history or question.system is not None:
                raise UserError(
                    "a raw prompt came with a system text or earlier turns",
                    hint="write them into the prompt, which is sent as it stands",
                )
            parts = prompt.split_raw(question.prompt)
        elif self.dressing != Dressing():
            turns = [] if question.system is None else [Turn("system", question.system)]
            for each in question.history:
                turns += [Turn("user", each.prompt, len(each.images)), Turn("assistant", each.answer)]
            turns.append(Turn("user", question.prompt, len(listed(question.image))))
            return rendered(Dialogue(tuple(turns)), self.dressing, self.config.template)
        else:
            messages = [] if question.system is None else [Message("system", question.system)]
            for turn in question.history:
                messages += [Message("user", turn.prompt, len(turn.images)), Message("assistant", turn.answer)]
            messages.append(Message("user", question.prompt, len(listed(question.image))))
            parts = prompt.render(self.config.template, messages)
        return Rendered(tuple(parts), tuple(range(sum(part.kind == "image" for part in parts))))

    def token_limit(self, image_tokens: int | None) -> int | None:
        """The most tokens of an image, as given. Raises UserError for what is no such number, and for any number where
        there are no eyes."""
        if image_tokens is None:
            return None
        if not isinstance(image_tokens, int) or isinstance(image_tokens, bool) or image_tokens < 1:
            raise UserError(
                f"image_tokens is {image_tokens!r:.100}",
                hint="give the most tokens that an image may take, a whole number from 1; without it all are kept",
            )
        if self.config.image is None:
            raise UserError(
                f"image_tokens is {image_tokens}, and {self.name} is a text model",
                hint="leave it out, or load a LLaVA checkpoint",
            )
        return image_tokens

    def eyes(self) -> tuple[ImageConfig, VisionConfig]:
        """How images become pixels. Raises UserError for a text model."""
        if self.config.image is None or self.config.vision is None:
            raise UserError(
                f"{self.name} is a text model: it has no vision tower, so it cannot look at an image",
                hint="ask without an image, or load a LLaVA checkpoint",
            )
        return self.config.image, self.config.vision

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises UserError for a prompt of no token, one that leaves no position for an answer, or an id that the
        model has no row for."""
        limit = self.config.text.max_positions
        if not ids:
            raise UserError("the prompt is empty: it has no token", hint="give at least one word")
        if len(ids) >= limit:
            raise TooLong(
                f"the prompt is {len(ids)} tokens long, images included; {self.name} has {limit} positions",
                hint="send fewer or smaller images, fewer turns or less text",
            )
        self._check_known("the prompt", ids)

    def _check_known(self, what: str, ids: Sequence[int]) -> None:
        strange = self.config.strange_id(ids)
        if strange is not None:
            raise UserError(
                f"{what} holds token {strange} ({self.tokenizer.token_of(strange)!r}); {self.name} has "
                f"{self.config.text.vocab}",
                hint="give ids of this model's tokenizer; or it and the weights belong to different models",
            )


def listed(image: Images) -> tuple[ImageLike, ...]:
    """One image, several or none, as a tuple."""
    if image is None:
        return ()
    if isinstance(image, Sequence) and not isinstance(image, str | bytes | bytearray | memoryview):
        return tuple(image)
    return (image,)
