"""Whether a model fits into memory, and what would fit where it does not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from pumice.checkpoints import Checkpoint
from pumice.checkpoints.mixes import MIXES
from pumice.errors import UserError
from pumice.network.placement import Placement
from pumice.room.footprint import Footprint, Share, as_mix, footprint, least, smallest
from pumice.room.memory import Memory, host, shown

LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
"""Quantisations to offer, the better first."""
NAMED = 3
"""So many ways out are named."""

Verdict = Literal["fits", "tight", "no"]


class Machine:
    """What there is to compute on."""

    def memory(self, device: torch.device) -> Memory | None:
        """Of a device; None where the system does not say. On a GPU, what PyTorch holds and does not use is free."""
        if device.type != "cuda":
            return host()
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))

    def gpu(self) -> torch.device | None:
        """The GPU that is taken without a choice."""
        return torch.device("cuda") if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Way:
    """A setting under which the model would fit, in words, and what it then needs."""

    setting: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.setting}: {shown(self.bytes)}"


class NoRoom(UserError):
    """A model does not fit into the memory that there is."""


def verdict(needs: Share, memory: Memory) -> Verdict:
    """`fits`: there is room for everything now. `no`: it is hopeless, for one of two reasons:

    - what the process must take for itself (weights that are converted, keys and values, room to compute) is more than
      is free now, with what the system can still move to its swap;
    - that and the files' pages are together more than the whole memory. Each token reads all weights once, one after
      the other, so that pages that do not all fit are read from the disk again for each token.

    `tight` is between: pages of files may take the place of other files' and of idle programs, or be read again now and
    then. It is slow for a while at worst, so a model is loaded.
    """
    if needs.own > memory.available + memory.swap or needs.total > memory.total:
        return "no"
    return "fits" if needs.total <= memory.available else "tight"


def judged(found: Footprint, memory: Memory) -> Verdict:
    """The verdict on a model: `no` where even a short question without a picture is hopeless, `fits` where one about
    the smallest picture has room."""
    if verdict(found.needs(*least(found.config)), memory) == "no":
        return "no"
    return "fits" if verdict(found.needs(*smallest(found.config)), memory) == "fits" else "tight"


def check(checkpoint: Checkpoint, dtype: torch.dtype | None, place: Placement, machine: Machine | None = None) -> None:
    """Raises UserError for a model that is hopeless (`judged`) on a device that it is to lie on, with up to three
    settings under which a question about the smallest picture fits. Nothing is read but headers."""
    for device in place.devices:
        _check(checkpoint, dtype, (place, device), machine or Machine())


def _check(
    checkpoint: Checkpoint, dtype: torch.dtype | None, part: tuple[Placement, torch.device], machine: Machine
) -> None:
    whole, device = part
    found = footprint(checkpoint.tensors, checkpoint.config, dtype, device, whole)
    memory = machine.memory(device)
    if memory is None or judged(found, memory) != "no":
        return
    gc.collect()  # a model that was dropped may still lie there
    memory = machine.memory(device)
    if memory is None or judged(found, memory) != "no":
        return
    place = "this machine" if device.type == "cpu" else f"the device {device}"
    needs, cache = found.needs(*least(checkpoint.config)), least(checkpoint.config)[0] * found.position_bytes
    raise NoRoom(
        f"{checkpoint.path} needs {shown(needs.total)} of memory ({shown(found.weights.total)} of weights, "
        f"{shown(cache)} of cache for one short question, the rest to compute); {place} has {shown(memory.total)}, "
        f"{shown(memory.available)} of it free",
        hint=advice(ways(checkpoint, dtype, device, machine)),
    )


def advice(found: list[Way]) -> str:
    """The ways out in one sentence."""
    if not found:
        return f"no setting would fit, down to a {LADDER[-1]} build; close other programs, or take a smaller model"
    few = "these would fit" if len(found) == NAMED else f"no more than {len(found)} of the settings would fit"
    return f"{few}: {'; '.join(map(str, found))}"


def ways(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, machine: Machine) -> list[Way]:
    """Up to three settings under which a question about the smallest picture fits into what is free: those that need no
    new file first, then the best quantisations that are smaller than the present weights."""
    found: dict[tuple[int, str], Way] = {}
    for setting, candidate, place in _candidates(checkpoint, dtype, device, machine):
        needs, memory = candidate.needs(*smallest(checkpoint.config)), machine.memory(place)
        if memory is not None and verdict(needs, memory) == "fits":
            found.setdefault((needs.total, place.type), Way(setting, needs.total))
        if len(found) == NAMED:
            break
    return list(found.values())


def gpu_layers(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, machine: Machine) -> int:
    """The most layers for `Placement.of_layers`, of a model that does not lie on the GPU as a whole, with which a
    question about the smallest picture fits on both sides; 0 for none."""
    config = checkpoint.config
    for layers in range(config.text.layers, 0, -1):
        place = Placement.of_layers(device, config.text.layers, layers)
        parts = {each: footprint(checkpoint.tensors, config, dtype, each, place) for each in place.devices}
        rooms = [(found.needs(*smallest(config)), machine.memory(each)) for each, found in parts.items()]
        if all(memory is not None and verdict(needs, memory) == "fits" for needs, memory in rooms):
            return layers
    return 0


def _candidates(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, machine: Machine
) -> Iterator[tuple[str, Footprint, torch.device]]:
    tensors, config = checkpoint.tensors, checkpoint.config
    if device.type != "cpu" and (layers := gpu_layers(checkpoint, dtype, device, machine)):
        place = Placement.of_layers(device, config.text.layers, layers)
        yield f"--gpu-layers {layers}", footprint(tensors, config, dtype, device, place), device
    other = torch.device("cpu") if device.type != "cpu" else machine.gpu()
    if other is not None:
        yield f"--device {other.type}", footprint(tensors, config, dtype, other), other
    present = footprint(tensors, config, dtype, device)
    for lower in (None, torch.bfloat16):
        if lower != dtype and (lower is None or lower.itemsize < present.dtype.itemsize):
            setting = "without --dtype" if lower is None else "--dtype bfloat16"
            yield setting, footprint(tensors, config, lower, device), device
    for name in LADDER:
        smaller = as_mix(checkpoint, MIXES[name])
        if smaller.nbytes < tensors.nbytes:
            source = " from the unquantised model" if present.in_blocks else ""
            setting = f"a build of {shown(smaller.nbytes)}{source}, pumice convert --quant {name}"
            yield setting, footprint(smaller, config, None, device), device
