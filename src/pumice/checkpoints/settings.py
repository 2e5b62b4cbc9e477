"""What config.json and preprocessor_config.json say, as pumice's shapes. What would compute anything else than pumice
does is refused by name.

Defaults are those of Transformers' classes (LlamaConfig, MistralConfig, Qwen2Config, CLIPVisionConfig and the image
processors): writers leave out what equals the default.
"""

from __future__ import annotations

import math
from typing import Literal

from pumice.checkpoints.fields import Fields, decimal, is_number, is_whole, shown
from pumice.config import TEXT_DEFAULTS, ImageConfig, Rotary, Size, TextConfig, TextDefaults, VisionConfig
from pumice.errors import UserError

MAX_LAYERS = 512
MAX_PX = 4096
"""The longest edge of a tile or canvas; published canvases end at 1008."""
MAX_PINPOINTS = 256
MAX_TILES = 64
"""Of one canvas; published canvases have up to 4."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

SCALINGS = "rotary embeddings without scaling, or scaled as linear, llama3 or longrope"


def unsupported(fields: Fields, what: str, known: str) -> UserError:
    return UserError(
        f"{fields.source}: {what}, which pumice does not have",
        hint=f"pumice runs {known}; another checkpoint of the same model may do",
    )


def text_config(fields: Fields, kind: str, *, tied: bool) -> TextConfig:
    """The language model. `kind` is its model_type: llama, mistral, qwen2 or phi3."""
    if kind not in TEXT_DEFAULTS:
        raise unsupported(fields, f"the language model is of type {shown(kind)}", ", ".join(TEXT_DEFAULTS))
    defaults = TEXT_DEFAULTS[kind]
    _refuse_other_text(fields, kind)
    width = fields.whole("hidden_size", defaults.width)
    heads = fields.whole("num_attention_heads", defaults.heads, most=1024)
    kv_heads = fields.whole("num_key_value_heads", defaults.kv_heads or heads, most=1024)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of the {heads} heads")
    head_width = fields.whole("head_dim", width // heads or None)
    if head_width % 2 or ("head_dim" not in fields and width % heads):
        raise fields.wrong("num_attention_heads", f"heads that share {width} channels evenly, an even number each")
    positions = fields.whole("max_position_embeddings", defaults.max_positions, most=2**24)
    return TextConfig(
        vocab=fields.whole("vocab_size", defaults.vocab),
        width=width,
        layers=fields.whole("num_hidden_layers", defaults.layers, most=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=fields.whole("intermediate_size", defaults.ffn_width),
        rotary=_rotary(fields, kind, head_width, positions),
        norm_eps=fields.number("rms_norm_eps", defaults.norm_eps),
        max_positions=positions,
        window=_window(fields, defaults),
        qkv_bias=defaults.qkv_bias,
        tied_embeddings=tied,
    )


def _refuse_other_text(fields: Fields, kind: str) -> None:
    if fields.text("hidden_act", "silu") != "silu":
        raise unsupported(fields, f"hidden_act is {shown(fields.raw('hidden_act'))}", "silu")
    for key in ("mlp_bias", *(("attention_bias",) if kind != "qwen2" else ())):
        if fields.flag(key, False):
            raise unsupported(fields, f"{key} is true", "Llama-shaped models without it")
    if "quantization_config" in fields:
        raise unsupported(fields, "the weights are quantised (quantization_config)", "weights in 16 or 32 bits")
    if kind == "qwen2" and fields.flag("use_sliding_window", False):
        raise unsupported(fields, "use_sliding_window is true", "full attention")


def _window(fields: Fields, defaults: TextDefaults) -> int | None:
    """Null says that there is none; absent means the class's own."""
    if not defaults.has_window or "sliding_window" not in fields.names:
        return defaults.window
    return fields.whole("sliding_window", most=2**24) if "sliding_window" in fields else None


def _rotary(fields: Fields, kind: str, head_width: int, positions: int) -> Rotary:
    """Transformers 5 writes `rope_parameters`; before, `rope_theta` stood alone beside `rope_scaling`, which wins.
    Formulas: its modeling_rope_utils.py."""
    key = "rope_scaling" if fields.inner("rope_scaling").names else "rope_parameters"
    given = fields.inner(key)
    for each in (given, fields):
        if each.number("partial_rotary_factor", 1.0) != 1.0:
            raise unsupported(each, "partial_rotary_factor is not 1: a part of each head turns", SCALINGS)
    theta = given.number("rope_theta", fields.number("rope_theta", 1e4))
    half = head_width // 2
    scaling = given.raw("rope_type") or given.raw("type") or "default"
    match scaling:
        case "default":
            return Rotary(theta)
        case "linear":
            factor = decimal(given.number("factor"))
            return Rotary(theta, (factor,) * half if factor != 1 else ())
        case "llama3":
            return Rotary(theta, _llama_3(given, theta, half, _trained_positions(fields, given, kind, positions)))
        case "longrope" | "su" if scaling == "longrope" or kind == "phi3":
            switch = _trained_positions(fields, given, kind, positions)
            factor = given.number("factor", positions / switch)
            usual = math.sqrt(1 + math.log(factor) / math.log(switch)) if factor > 1 else 1.0
            short, long = divisors(given, "short_factor", half), divisors(given, "long_factor", half)
            magnitude = decimal(given.number("attention_factor", usual))
            if short == long:
                return Rotary(theta, short, magnitude=magnitude)
            return Rotary(theta, short, long, switch, magnitude)
    raise unsupported(fields, f"{key} is of type {shown(scaling)}", SCALINGS)


def _trained_positions(fields: Fields, given: Fields, kind: str, positions: int) -> int:
    """How long the sequences were before the scaling; Phi-3 says it beside the scaling, and that counts."""
    key = "original_max_position_embeddings"
    if key in fields or kind == "phi3":
        return fields.whole(key, 4096, least=2, most=2**24)
    return given.whole(key, positions, least=2, most=2**24)


def _llama_3(given: Fields, theta: float, half: int, trained: int) -> tuple[float, ...]:
    """Long waves are stretched by the factor, short ones left, those between stretched in part (Llama 3.1)."""
    factor, low, high = (given.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise given.wrong("high_freq_factor", f"more than low_freq_factor, {low}")
    turns = [trained * theta ** (-i / half) / (2 * math.pi) for i in range(half)]
    shares = [min(1.0, max(0.0, (each - low) / (high - low))) for each in turns]
    return tuple(decimal(1 / ((1 - share) / factor + share)) for share in shares)


def divisors(fields: Fields, key: str, count: int) -> tuple[float, ...]:
    """A number above zero for each rotary frequency, as a float32, which is how it is used and what GGUF holds."""
    values = fields.raw(key)
    if not isinstance(values, list) or len(values) != count or not all(is_number(each) and each > 0 for each in values):
        raise fields.wrong(key, f"{count} numbers above zero, one for each frequency")
    return tuple(decimal(each) for each in values)


def vision_config(fields: Fields, feature_layers: tuple[int, ...], *, keep_class_token: bool) -> VisionConfig:
    """The vision tower, from a CLIPVisionConfig."""
    kind = fields.text("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise unsupported(fields, f"the vision tower is of type {shown(kind)}", "OpenAI's CLIP (clip_vision_model)")
    if fields.whole("num_channels", 3) != 3:
        raise fields.wrong("num_channels", "3")
    layers = fields.whole("num_hidden_layers", 12, most=MAX_LAYERS)
    width, heads = fields.whole("hidden_size", 768), fields.whole("num_attention_heads", 12, most=1024)
    image_px, patch_px = fields.whole("image_size", 224, most=MAX_PX), fields.whole("patch_size", 32, most=MAX_PX)
    if width % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of the {width} channels")
    if patch_px > image_px:
        raise fields.wrong("patch_size", f"at most the {image_px} pixels of the image")
    if not all(-layers - 1 <= layer <= layers for layer in feature_layers):
        raise UserError(
            f"{fields.source}: features are read from layer {shown(list(feature_layers))} of a tower of {layers}",
            hint="the file is damaged, or describes another tower",
        )
    return VisionConfig(
        image_px=image_px,
        patch_px=patch_px,
        width=width,
        layers=layers,
        heads=heads,
        ffn_width=fields.whole("intermediate_size", 3072),
        activation=_activation(fields),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        feature_layers=feature_layers,
        keep_class_token=keep_class_token,
    )


def _activation(fields: Fields) -> Literal["quick_gelu", "gelu"]:
    known: tuple[Literal["quick_gelu", "gelu"], ...] = ("quick_gelu", "gelu")
    return fields.one_of("hidden_act", known[0], known)


Mode = Literal["pad", "crop", "anyres"]


def image_config(fields: Fields, mode: Mode, vision: VisionConfig, pinpoints: tuple[Size, ...]) -> ImageConfig:
    """How pictures become pixels, from an image processor's fields; with `anyres`, `pinpoints` in (height, width)."""
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not fields.flag(key, True):
            raise unsupported(fields, f"{key} is false", "CLIP's preprocessing: resize, crop, rescale and normalise")
    crop = _edges(fields, "crop_size", 224, square=True)
    if crop != (vision.image_px, vision.image_px):
        raise fields.wrong("crop_size", f"the {vision.image_px} x {vision.image_px} pixels of the vision tower")
    return ImageConfig(
        mode=mode,
        resize_px=_edges(fields, "size", 224, square=False),
        crop_px=vision.image_px,
        mean=channels(fields, "image_mean", CLIP_MEAN),
        std=channels(fields, "image_std", CLIP_STD),
        rescale=fields.number("rescale_factor", 1 / 255),
        resample=fields.whole("resample", 3, least=0, most=5),
        pinpoints=pinpoints if mode == "anyres" else (),
    )


def _edges(fields: Fields, key: str, default_px: int, *, square: bool) -> Size | int:
    """Transformers' get_size_dict: a pair, a shortest edge, or an int, which means a square for a crop and a shortest
    edge for a resize."""
    value = fields.raw(key)
    match value:
        case None:
            edges: tuple[object, ...] = (default_px,)
        case {"height": height, "width": width, **rest} if not rest:
            edges = (height, width)
        case {"shortest_edge": edge, **rest} if not rest and not square:
            edges = (edge,)
        case int():
            edges = (value,)
        case _:
            edges = ()
    sizes = [edge for edge in edges if is_whole(edge) and 1 <= edge <= MAX_PX]
    if not edges or len(sizes) != len(edges):
        form = 'a {"height", "width"}' + ("" if square else ' or a {"shortest_edge"}')
        raise fields.wrong(key, f"{form} of 1 to {MAX_PX} pixels")
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    return (sizes[0], sizes[0]) if square else sizes[0]


def channels(fields: Fields, key: str, default: tuple[float, float, float] | None = None) -> tuple[float, float, float]:
    """A number for each of red, green and blue."""
    value = fields.raw(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(is_number(each) and abs(each) < 1e3 for each in value):
        raise fields.wrong(key, "three numbers")
    if key.endswith("image_std") and min(value) <= 0:
        raise fields.wrong(key, "three numbers above zero")
    red, green, blue = (float(each) for each in value)
    return red, green, blue


def pinpoints(fields: Fields, default: tuple[Size, ...], tile_px: int) -> tuple[Size, ...]:
    """The canvases of 1.6 as the file lists them. Each must be made of whole tiles."""
    value = fields.raw("image_grid_pinpoints")
    if value is None:
        found = default
    elif isinstance(value, list) and 1 <= len(value) <= MAX_PINPOINTS and all(_is_pair(pair) for pair in value):
        found = tuple((first, second) for first, second in value)
    else:
        raise fields.wrong("image_grid_pinpoints", f"1 to {MAX_PINPOINTS} pairs of sizes, each 1 to {MAX_PX} pixels")
    for pair in found:
        if pair[0] % tile_px or pair[1] % tile_px:
            raise UserError(
                f"{fields.source}: image_grid_pinpoints has {list(pair)}, which is not made of {tile_px} px tiles",
                hint="the file belongs to another vision tower, or is damaged",
            )
        if pair[0] * pair[1] > MAX_TILES * tile_px**2:
            raise UserError(
                f"{fields.source}: image_grid_pinpoints has {list(pair)}, more than {MAX_TILES} tiles of {tile_px} px",
                hint="the file belongs to another vision tower, or is damaged",
            )
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_whole(each) and 1 <= each <= MAX_PX for each in value)
