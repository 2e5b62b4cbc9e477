"""The loop: draw a batch, compare, step, save. A run that was stopped goes on as if it never had been.

B rows · T positions · D width · L learned positions
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice import checkpoints, store
from pumice.config import LlavaConfig
from pumice.errors import UserError
from pumice.network.llava import Llava
from pumice.tokenizer import Tokenizer
from pumice.train.data import IGNORED, Dataset, JsonDataset, TrainBatch, collate, encode
from pumice.train.recipe import Part, Recipe

BETAS, EPSILON = (0.9, 0.999), 1e-8


def train(recipe: Recipe, *, output: Path, dataset: Dataset | None = None, resume: bool = True) -> Path:
    """Run a recipe to its end and write the trained checkpoint, a Hugging Face folder: `output/model`.

    `output` also gets log.jsonl (a line a step: step, loss, rate, gradient norm, seconds) and, until the end,
    state.pt, from which an interrupted run resumes exactly. SIGTERM saves the state and stops.

    Raises UserError for what is wrong with the recipe, the model or a sample.
    """
    checkpoint = checkpoints.read(store.resolve(recipe.model))
    if checkpoint.config.vision is None and set(recipe.parts) != {"language_model"}:
        raise UserError(
            f"{recipe.model} is a text model", hint='train parts = ["language_model"], or start from a LLaVA'
        )
    network = build(checkpoint)
    data = dataset if dataset is not None else JsonDataset(Path(recipe.data), Path(recipe.images))
    output.mkdir(parents=True, exist_ok=True)
    state_file = output / "state.pt"
    optimiser = torch.optim.AdamW(groups(network, recipe), betas=BETAS, eps=EPSILON, weight_decay=recipe.weight_decay)
    step = _resumed(state_file, network, optimiser) if resume and state_file.exists() else 0
    with _stop_signal() as stopped, (output / "log.jsonl").open("a", encoding="utf-8") as log:
        while step < recipe.steps:
            started = time.perf_counter()
            batch = draw(data, step, recipe, checkpoint.config, checkpoint.tokenizer)
            line = {"step": step} | _step(network, optimiser, batch, recipe, step)
            step += 1
            log.write(json.dumps(line | {"seconds": round(time.perf_counter() - started, 4)}) + "\n")
            if stopped() or step % recipe.save_every == 0 or step == recipe.steps:
                log.flush()
                _save(state_file, network, optimiser, step)
            if stopped() and step < recipe.steps:
                raise SystemExit(f"stopped at step {step} of {recipe.steps}; the same command goes on from there")
    folder = output / "model"
    checkpoints.write_hf(folder, checkpoint.config, network.state_dict(), tokenizer_files=checkpoint.path)
    return folder


def build(checkpoint: checkpoints.Checkpoint) -> Llava:
    """The network with its own float32 copy of the checkpoint's weights, all of them ready to learn."""
    network = Llava(checkpoint.config)
    network.load_state_dict({name: checkpoint.tensors[name].float() for name in network.state_dict()})
    return network.train()


def groups(network: Llava, recipe: Recipe) -> list[dict[str, object]]:
    """The optimiser's groups: what learns, each part with its rate; everything else stops asking for gradients."""
    chosen: dict[Part, list[Tensor]] = {part: [] for part in recipe.parts}
    for name, weight in network.named_parameters():
        part = part_of(name)
        weight.requires_grad_(part in chosen)
        if part in chosen:
            chosen[part].append(weight)
    rates = {"vision_tower": recipe.tower_rate or recipe.rate}
    return [
        {"params": weights, "lr": rates.get(part, recipe.rate), "peak": rates.get(part, recipe.rate)}
        for part, weights in chosen.items()
    ]


def part_of(name: str) -> Part:
    """Which part of a recipe a weight belongs to; the newline vector is trained with the projector."""
    match name.split(".")[0]:
        case "vision_tower":
            return "vision_tower"
        case "multi_modal_projector" | "image_newline":
            return "projector"
        case _:
            return "language_model"


def draw(data: Dataset, step: int, recipe: Recipe, config: LlavaConfig, tokenizer: Tokenizer) -> TrainBatch:
    """The batch of a step: a new shuffle for each pass over the data, the same for the same seed."""
    template = recipe.template or config.template
    samples = []
    for position in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, place = divmod(position, len(data))
        samples.append(data.sample(_shuffled(place, len(data), seed=recipe.seed + epoch)))
    return collate(
        [encode(each, config, tokenizer, template=template, max_tokens=recipe.max_tokens) for each in samples]
    )


def _shuffled(place: int, count: int, *, seed: int) -> int:
    """Where a place goes in a shuffle of `count` that needs no list: an affine map with a factor prime to the count."""
    factor = (2654435761 * (2 * seed + 1)) % count or 1
    while math.gcd(factor, count) != 1:
        factor += 1
    return (place * factor + seed * 40503) % count


def loss_of(network: Llava, batch: TrainBatch) -> Tensor:
    """Mean cross-entropy of the learned tokens, each predicted from the position before it; scores of other
    positions are never computed."""
    features = network.encode(batch.pixels_N3YX, batch.grids) if batch.pixels_N3YX is not None else []
    hidden_BTD = network(network.embed(batch.ids_BT, features))
    targets_BT = batch.labels_BT[:, 1:]
    learned_BT = targets_BT != IGNORED
    logits_LV = network.logits(hidden_BTD[:, :-1][learned_BT])
    return F.cross_entropy(logits_LV.float(), targets_BT[learned_BT])


def rate_at(step: int, recipe: Recipe) -> float:
    """The share of the peak rate at a step: linear warm-up, then half a cosine down to `final`."""
    warm = math.ceil(recipe.warmup * recipe.steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return recipe.final + (1 - recipe.final) * 0.5 * (1 + math.cos(math.pi * done))


def _step(
    network: Llava, optimiser: torch.optim.Optimizer, batch: TrainBatch, recipe: Recipe, step: int
) -> dict[str, float]:
    share = rate_at(step, recipe)
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share
    optimiser.zero_grad(set_to_none=True)
    loss = loss_of(network, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    learning = [weight for group in optimiser.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(learning, recipe.clip_norm)
    if not math.isfinite(float(norm)):
        raise UserError(f"the gradient at step {step} is {float(norm)}", hint="lower the learning rate")
    optimiser.step()
    return {"loss": round(loss.item(), 5), "rate": share * recipe.rate, "norm": round(float(norm), 4)}


def _save(path: Path, network: Llava, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Everything the next step depends on; written beside and renamed, so that a kill leaves the older state whole."""
    beside = path.with_suffix(".part")
    torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, beside)
    os.replace(beside, path)


def _resumed(path: Path, network: Llava, optimiser: torch.optim.Optimizer) -> int:
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is remembered instead of obeyed; the value tells whether it has come."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
