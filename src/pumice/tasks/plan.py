"""What a model would take on this machine, what fits beside it, and how fast it would be. No weights are read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pumice.checkpoints import Checkpoint
from pumice.model import chosen_device, chosen_dtype
from pumice.room.fitting import Machine, Verdict, Way, judged, ways
from pumice.room.footprint import Footprint, Share, footprint, grids, largest
from pumice.room.memory import Memory
from pumice.source import Source
from pumice.tasks.pace import Pace, measure, slice_bytes


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes."""

    model: str
    family: str
    device: str
    dtype: str
    """The type that is computed with."""
    text: Share
    """The language model's weights."""
    eyes: Share
    """Those of the vision tower and the projector."""
    position_bytes: int
    """Keys and values of a token."""
    work_bytes: int
    """About what reading a question takes besides."""
    pictures: dict[str, int]
    """Tokens of a picture that fills its canvas, by width x height."""
    memory: Memory | None
    """Of the device; None where the system does not say, and then there is no verdict."""
    verdict: Verdict | None
    context: int
    """Longest conversation, in tokens, that fits beside the weights or that the model can read."""
    positions: int
    """That the model can read."""
    conversations: int
    """How many of that length fit at once."""
    ways: tuple[Way, ...]
    """Settings that fit, where the model does not."""
    blocks: int
    """Of the language model."""
    gpu_layers: int | None
    """How many of them would fit on the GPU, with its head, the eyes, and keys and values of the longest context; None
    without a GPU."""
    pace: Pace | None
    """None where there is no room to measure it."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def plan(
    model: str | Path | Source,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    machine: Machine | None = None,
    probe: bool = True,
) -> Plan:
    """The plan of a model that is not loaded. The other arguments are those of `load`.

    machine: what there is to compute on, instead of this one. probe: measure the pace, for about two seconds.

    Raises UserError: what `load` raises for the name and the files.
    """
    source = model if isinstance(model, Source) else Source(model)
    checkpoint, machine = source.checkpoint(), machine or Machine()
    type_, place = chosen_dtype(dtype), chosen_device(device)
    config = checkpoint.config
    found, memory = footprint(checkpoint.tensors, config, type_, place), machine.memory(place)
    said = None if memory is None else judged(found, memory)
    room = None if memory is None else _room(found, memory, said)
    longest = config.text.max_positions
    context = longest if room is None else min(longest, room // found.position_bytes)
    measurable = memory is None or slice_bytes(found) * 2 < memory.available
    return Plan(
        model=str(source.name),
        family=config.family,
        device=str(place),
        dtype=str(found.dtype).removeprefix("torch."),
        text=found.text,
        eyes=found.eyes,
        position_bytes=found.position_bytes,
        work_bytes=found.work(*largest(config)),
        pictures={canvas: grid.tokens for canvas, grid in grids(config).items()},
        memory=memory,
        verdict=said,
        context=context,
        positions=longest,
        conversations=0 if room is None or context == 0 else room // (context * found.position_bytes),
        ways=tuple(ways(checkpoint, type_, place, machine)) if said == "no" else (),
        blocks=config.text.layers,
        gpu_layers=_gpu_layers(checkpoint, type_, machine, context),
        pace=measure(checkpoint, found, type_, place, context) if probe and measurable else None,
    )


def _room(found: Footprint, memory: Memory, said: Verdict | None) -> int:
    """What is left for keys and values. Where it is tight, pages of files give way."""
    weights = found.weights.own if said == "tight" else found.weights.total
    return max(0, memory.available - weights - found.work(*largest(found.config)))


def _gpu_layers(checkpoint: Checkpoint, dtype: torch.dtype | None, machine: Machine, context: int) -> int | None:
    gpu = machine.gpu()
    memory = None if gpu is None else machine.memory(gpu)
    if gpu is None or memory is None:
        return None
    there = footprint(checkpoint.tensors, checkpoint.config, dtype, gpu)
    room = memory.available - (there.weights.total - sum(there.layers)) - there.work(*largest(there.config))
    cache, count = context * there.position_bytes // len(there.layers), 0
    for layer in there.layers:
        room -= layer + cache
        if room < 0:
            break
        count += 1
    return count
