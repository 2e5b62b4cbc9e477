"""The shapes of a LLaVA, as frozen numbers. Every reader of a file format ends here; nothing after it looks at a file.

Sizes are (height, width). A derived number is a property, so that it has one home.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Self

Size = tuple[int, int]
"""(height, width) in pixels, unless a name says otherwise."""
Rules = Literal["hf", "original"]
"""Whose preprocessing: Transformers' or the LLaVA authors'."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a CLIP ViT (Radford et al. 2021), read out at inner layers."""

    image_px: int
    patch_px: int
    width: int
    layers: int
    heads: int
    ffn_width: int
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5
    feature_layers: tuple[int, ...] = (-2,)
    """Which hidden states are the features: 0 is the embedding, k the output of block k, negative counts from the end.
    Several are joined along the channels (Transformers `vision_feature_layer`)."""
    post_norm: bool = True
    """Is a norm stored behind the last block? No feature passes it; some files leave it out."""
    keep_class_token: bool = False
    """True for the strategies `full` (Transformers) and `cls_patch` (the authors)."""

    @property
    def side(self) -> int:
        """Patches along one edge: 336 // 14 = 24."""
        return self.image_px // self.patch_px

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def positions(self) -> int:
        """Patches and the class token."""
        return self.patches + 1

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def feature_width(self) -> int:
        """Channels that enter the projector."""
        return self.width * len(self.feature_layers)

    @property
    def blocks_needed(self) -> int:
        """How many blocks must run: block 23 of 24 for feature layer -2."""
        return max(layer if layer >= 0 else self.layers + 1 + layer for layer in self.feature_layers)

    @property
    def tile_tokens(self) -> int:
        """Features of one tile, the class token included when it is kept."""
        return self.patches + (1 if self.keep_class_token else 0)


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys (Su et al. 2021): frequency i of a head is 1 / (divisor_i theta^(2i/width)).

    No divisors: all 1. With `long_divisors` a sequence longer than `switch` tokens turns by those, all its positions
    (LongRoPE, Ding et al. 2024). Cosines and sines are multiplied by `magnitude`.
    """

    theta: float = 1e4
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    switch: int | None = None
    """With long divisors and only with them."""
    magnitude: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """The language model: Llama and whatever differs from it in numbers only."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    rotary: Rotary = Rotary()
    norm_eps: float = 1e-5
    max_positions: int = 4096
    window: int | None = None
    """How many tokens a query may look at, its own included; None: all before it."""
    qkv_bias: bool = False
    tied_embeddings: bool = False


@dataclass(frozen=True)
class ProjectorConfig:
    """`linear` is one layer; `mlpNx_gelu` is N layers with an exact GELU between them."""

    layers: int = 2
    bias: bool = True


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels, as the checkpoint's own files say.

    mode `pad`: square with the mean colour, then resize (the authors' 1.5); `crop`: shortest edge, then centre crop
    (Transformers' 1.5); `anyres`: tiles (1.6).
    """

    mode: Literal["pad", "crop", "anyres"]
    resize_px: Size | int
    """An int is the length of the shortest edge; a pair is the exact size."""
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float = 1 / 255
    resample: int = 3
    """Pillow's number: 3 is bicubic."""
    pinpoints: tuple[Size, ...] = ()
    """Canvases to choose from, (height, width), in the order of the file: the first wins a tie. The authors read each
    pair of the same list as (width, height), so their reader turns the pairs round."""
    rules: Rules = "hf"
    """Whose files these are: Transformers' or the authors'."""

    @property
    def rounds_unpad(self) -> bool:
        """Transformers rounds to 7 digits before it cuts the padding off a feature map; the authors do not."""
        return self.rules == "hf"

    def under(self, rules: Rules) -> Self:
        """The same tower's preprocessing by the other's rules: crop or pad for 1.5; for 1.6 the reading of the
        pinpoints, whose pairs the two take in opposite order, and the rounding. Unchanged under its own rules."""
        if rules == self.rules:
            return self
        if self.mode != "anyres":
            return replace(self, mode="crop" if rules == "hf" else "pad", rules=rules)
        turned = tuple((width, height) for height, width in self.pinpoints)
        return replace(self, pinpoints=turned, rules=rules)


@dataclass(frozen=True)
class LlavaConfig:
    """A whole model. `vision`, `projector` and `image` are None together: a text model, a LLaVA without eyes."""

    text: TextConfig
    vision: VisionConfig | None
    projector: ProjectorConfig | None
    image: ImageConfig | None
    template: str
    """A name that `prompt.TEMPLATES` knows."""
    stop_ids: tuple[int, ...]
    """End-of-sequence token ids."""
    image_token_id: int = -200
    """The id that stands for one image feature in a prompt: a row of the vocabulary in Transformers' folders; in the
    authors' folders the vocabulary has none and -200 stands outside it."""
    has_newline: bool = False
    """1.6: a learned vector ends each row of the tile grid."""
    family: str = "text"
    """`llava-1.5`, `llava-1.6` or `text`: what `pumice show` prints."""

    def strange_id(self, ids: Iterable[int]) -> int | None:
        """The first id that is neither a row of the vocabulary nor the image token."""
        return next((id for id in ids if not 0 <= id < self.text.vocab and id != self.image_token_id), None)


@dataclass(frozen=True)
class TextDefaults:
    """What a config.json means that leaves a number out, as writers do where it equals the default of Transformers'
    class."""

    vocab: int
    ffn_width: int
    max_positions: int
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    """None: as many as heads."""
    norm_eps: float = 1e-6
    has_window: bool = False
    window: int | None = None
    qkv_bias: bool = False


TEXT_DEFAULTS = {
    "llama": TextDefaults(vocab=32000, ffn_width=11008, max_positions=2048),
    "mistral": TextDefaults(
        vocab=32000, ffn_width=14336, max_positions=131072, kv_heads=8, has_window=True, window=4096
    ),
    "qwen2": TextDefaults(vocab=151936, ffn_width=22016, max_positions=32768, kv_heads=32, qkv_bias=True),
    "phi3": TextDefaults(vocab=32064, ffn_width=8192, max_positions=4096, width=3072, norm_eps=1e-5, has_window=True),
}
"""By the model_type of a language model."""
