"""LoRA adapters merged into their base on load: W + (alpha / r) · B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pumice.checkpoints.fields import Fields, shown
from pumice.checkpoints.form import canonical
from pumice.checkpoints.settings import unsupported
from pumice.checkpoints.tensors import Entry, listed, open_file
from pumice.errors import UserError

MAX_RANK = 4096

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def merged(base: Mapping[str, Entry], folder: Path, config: Fields) -> dict[str, Entry]:
    """The base's tensors, those that the adapter in `folder` changes merged when they are loaded.

    `base` is by pumice's names; `config` is adapter_config.json. Raises UserError for an adapter that is no plain LoRA,
    does not fit the base, or is incomplete.
    """
    rank, scale = _settings(config)
    files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has an adapter_config.json but no adapter_model.safetensors or .bin", hint="get the missing file"
        )
    result = dict(base)
    for name, sides in _pairs(path).items():
        if name not in base:
            raise UserError(
                f"{path} adapts {shown(name)}, which the base model does not have",
                hint="name the base model that the adapter was trained on",
            )
        result[name] = _merged_entry(base[name], sides, scale=scale, rank=rank, path=path)
    return result


def _settings(config: Fields) -> tuple[int, float]:
    """Rank and scale. What would need another formula is refused."""
    if config.text("peft_type", "LORA") != "LORA":
        raise unsupported(config, f"peft_type is {shown(config.raw('peft_type'))}", "LORA")
    for key in ("use_dora", "fan_in_fan_out"):
        if config.flag(key, False):
            raise unsupported(config, f"{key} is true", "plain LoRA adapters")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.raw(key):
            raise unsupported(config, f"{key} is set", "adapters with one rank and scale for all modules")
    if config.text("bias", "none") != "none":
        raise unsupported(config, f"bias is {shown(config.raw('bias'))}", "adapters with bias 'none'")
    rank = config.whole("r", most=MAX_RANK)
    alpha = config.number("lora_alpha", 8)
    return rank, alpha / math.sqrt(rank) if config.flag("use_rslora", False) else alpha / rank


def _pairs(path: Path) -> dict[str, dict[str, Entry]]:
    """The two factors of each adapted tensor."""
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in open_file(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{path} holds {shown(key)}, which is no factor of a LoRA",
                hint="pumice reads plain LoRA adapters of PEFT",
            )
        sides = pairs.setdefault(canonical(f"{match['module']}.weight"), {})
        if match["side"] in sides:
            raise UserError(
                f"{path}: {shown(sides[match['side']].key)} and {shown(key)} are the same factor",
                hint="the file mixes two adapters; get it again",
            )
        sides[match["side"]] = entry
    if alone := [name for name, sides in pairs.items() if len(sides) != 2]:
        raise UserError(f"{path} holds only one factor of {listed(alone)}", hint="get the adapter again")
    return pairs


def _merged_entry(base: Entry, sides: Mapping[str, Entry], *, scale: float, rank: int, path: Path) -> Entry:
    down, up = sides["A"], sides["B"]
    if len(base.shape) != 2 or down.shape != (rank, base.shape[1]) or up.shape != (base.shape[0], rank):
        raise UserError(
            f"{path}: the factors of {shown(base.key)} are {list(up.shape)} and {list(down.shape)}; "
            f"rank {rank} over {list(base.shape)} was expected",
            hint="name the base model that the adapter was trained on",
        )

    def load() -> Tensor:
        change = up.dense().to(torch.float32) @ down.dense().to(torch.float32)
        return (base.dense().to(torch.float32) + scale * change).to(base.dtype)

    return replace(base, load=load, computed=True)
