"""`pumice plan`: what a model would take here, what fits, and how fast it would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pumice.cli import options
from pumice.cli.options import AsJson, Beside, Device, Dtype, ModelName, Template
from pumice.cli.terminal import busy

if TYPE_CHECKING:
    from pumice.room.footprint import Share
    from pumice.tasks.pace import Pace
    from pumice.tasks.plan import Plan


def plan(
    model: ModelName,
    template: Template = None,
    beside: Beside = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model would take here before it is loaded: memory, what fits beside it, how fast it would be.

    pumice plan llava-q4.gguf
    """
    with busy("measuring this machine"):
        from pumice.tasks.plan import plan as planned

        found = planned(options.source(model, template, None, beside), dtype=dtype, device=device)
    if as_json:
        print(found.to_json())
        return
    for name, value in lines(found):
        print(f"{name:18} {value}")


def lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """The plan for people: what a line is about, and what it says."""
    from pumice.room.memory import shown

    yield "language model", _weights(plan.text)
    if plan.pictures:
        yield "eyes", _weights(plan.eyes)
    yield "computing", f"about {shown(plan.work_bytes)}, in {plan.dtype}"
    whole = plan.positions * plan.position_bytes
    yield "keys and values", f"{plan.position_bytes:,} bytes a token, {shown(whole)} for all {plan.positions:,}"
    if len(plan.pictures) == 1:
        yield "a picture", f"{min(plan.pictures.values()):,} tokens"
    elif plan.pictures:
        each = ", ".join(f"{canvas} {tokens:,}" for canvas, tokens in plan.pictures.items())
        yield "a picture", f"tokens where it fills its canvas, and less elsewhere: {each}"
    yield from _fit(plan)
    if plan.gpu_layers is not None:
        fit = f"{plan.gpu_layers} of {plan.blocks} blocks of the language model fit, with its head and the eyes"
        some = 0 < plan.gpu_layers < plan.blocks
        yield "on the GPU", f"{fit}: --gpu-layers {plan.gpu_layers + 1}" if some else fit
    if plan.pace is not None:
        yield from _pace(plan, plan.pace)


def _weights(share: Share) -> str:
    from pumice.room.memory import shown

    parts = {"pages of the file": share.mapped, "memory of its own": share.own}
    return f"{shown(share.total)}: " + ", ".join(f"{shown(size)} {what}" for what, size in parts.items() if size)


def _fit(plan: Plan) -> Iterator[tuple[str, str]]:
    from pumice.room.memory import shown

    if plan.memory is None or plan.verdict is None:
        yield "memory", "the system does not say how much there is"
        return
    yield "memory", f"{shown(plan.memory.available)} free of {shown(plan.memory.total)} ({plan.device})"
    words = {
        "fits": "yes",
        "tight": "only if other programs make room, or pages of the file are read again from the disk",
        "no": "no, and it will not be loaded",
    }
    yield "does it fit", words[plan.verdict]
    for way in plan.ways:
        yield "", f"this would: {way}"
    if plan.verdict != "no":
        most = "as many as the model can read" if plan.context == plan.positions else f"of {plan.positions:,}"
        at_once = f"{plan.conversations} such conversation{'s' if plan.conversations != 1 else ''} at once"
        yield "longest context", f"{plan.context:,} tokens, {most}; {at_once}"


def _pace(plan: Plan, pace: Pace) -> Iterator[tuple[str, str]]:
    probe = f"from {pace.probe_s:.1f} s with a slice of the model and numbers of no meaning"
    yield "an estimate", f"{probe}; memory is read at {pace.read_bytes_per_s / 1e9:.1f} GB/s"
    last = f"{pace.decode_last:.3g} at the end of the longest context"
    limit = f"memory alone would allow {pace.decode_limit:.3g}"
    yield "an answer", f"{pace.decode:.3g} tokens/s, {last}; {limit}"
    yield "a prompt", f"{pace.prefill:.3g} tokens/s"
    if pace.tile_s is not None:
        yield "a tile", f"{pace.tile_s:.3g} s"
