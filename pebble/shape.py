"""The sizes of pebble: everything that is a number about the model, in one place."""

from __future__ import annotations

from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig, TextConfig, VisionConfig

TILE_PX, PATCH_PX = 96, 12
TEMPLATE = "chatml_direct"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Canvases of the 1.6 form in tiles, (height, width): LLaVA 1.6's own list."""

VISION = VisionConfig(image_px=TILE_PX, patch_px=PATCH_PX, width=192, layers=6, heads=6, ffn_width=768)


def text(vocab: int) -> TextConfig:
    """The language model, for a vocabulary of this many rows."""
    return TextConfig(
        vocab=vocab,
        width=256,
        layers=4,
        heads=4,
        kv_heads=2,
        head_width=64,
        ffn_width=640,
        max_positions=2048,
        tied_embeddings=True,
    )


def pebble(form: str, *, vocab: int, image_token_id: int, end_id: int) -> LlavaConfig:
    """The whole model in its form `1.5` (one view, padded to a square) or `1.6` (tiles)."""
    tiled = form == "1.6"
    image = ImageConfig(
        mode="anyres" if tiled else "pad",
        resize_px=TILE_PX,
        crop_px=TILE_PX,
        mean=MEAN,
        std=STD,
        pinpoints=tuple((TILE_PX * rows, TILE_PX * columns) for rows, columns in PINPOINTS) if tiled else (),
    )
    return LlavaConfig(
        text=text(vocab),
        vision=VISION,
        projector=ProjectorConfig(layers=2),
        image=image,
        template=TEMPLATE,
        stop_ids=(end_id,),
        image_token_id=image_token_id,
        has_newline=tiled,
        family=f"llava-{form}",
    )
