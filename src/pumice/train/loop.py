"""The loop: draw a batch, compare, step, save. A run that was stopped goes on as if it never had been.

B rows · T positions · D width · L learned positions
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice import checkpoints, store
from pumice.config import LlavaConfig
from pumice.errors import UserError
from pumice.network.llava import Llava
from pumice.tokenizer import Tokenizer
from pumice.train.data import IGNORED, Dataset, JsonDataset, Row, TrainBatch, collate, encode
from pumice.train.recipe import Part, Recipe
from pumice.train.state import State, log_from, stop_signals

BETAS, EPSILON = (0.9, 0.999), 1e-8


def train(recipe: Recipe, *, output: Path, dataset: Dataset | None = None, resume: bool = True) -> Path:
    """Run a recipe to its end and write the trained checkpoint, a Hugging Face folder: `output/model`.

    `output` also gets log.jsonl (a line a step: step, loss, the parts' rates, gradient norm, seconds) and, until the
    checkpoint is written, state.pt, from which an interrupted run resumes exactly; not resume: from the first step.
    SIGTERM and Ctrl-C end the step, save the state and stop (SystemExit, KeyboardInterrupt); a second Ctrl-C does not
    wait. What is wrong with a sample stops the run too, its state saved.

    Raises UserError, before the first step, for what is wrong with the recipe or the model, a run that is finished
    (output/model is there) or was begun with another recipe; later, for what is wrong with a sample.
    """
    checkpoint = checkpoints.read(store.resolve(recipe.model))
    if checkpoint.format == "gguf":
        raise UserError(
            f"{recipe.model} is a GGUF file",
            hint="train the folder that it was made of; no folder is made of a GGUF yet",
        )
    config, folder = _config(checkpoint.config, recipe), output / "model"
    checkpoints.check_writable(folder, config, tokenizer_files=checkpoint.path)
    data = dataset if dataset is not None else _named_data(recipe)
    if not len(data):
        raise UserError("the data set has no samples", hint="give at least one")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}", hint="name a folder to write to") from error
    network = build(checkpoint)
    optimiser = torch.optim.AdamW(groups(network, recipe), betas=BETAS, eps=EPSILON, weight_decay=recipe.weight_decay)
    state = State(output / "state.pt", recipe, network, optimiser)
    if not resume:
        state.remove()
    step = state.resume()
    with stop_signals() as stop, log_from(output / "log.jsonl", step) as log:
        try:
            while step < recipe.steps and not stop.asked:
                started = time.perf_counter()
                rows = draw(data, step, recipe, config, checkpoint.tokenizer)
                line = {"step": step, **_step(network, optimiser, rows, recipe, step)}
                log.write(json.dumps(line | {"seconds": round(time.perf_counter() - started, 4)}) + "\n")
                step += 1
                if step % recipe.save_every == 0:
                    state.save(step)
        except UserError:  # raised before the optimiser moved: the state is that of the step before
            state.save(step)
            raise
        state.save(step)
        if step < recipe.steps:
            stop.leave(f"stopped at step {step} of {recipe.steps}; the same command goes on from there")
    checkpoints.write_hf(folder, config, network.state_dict(), tokenizer_files=checkpoint.path)
    state.remove()
    return folder


def _config(config: LlavaConfig, recipe: Recipe) -> LlavaConfig:
    """The config that is trained and written."""
    if config.image is None:
        if set(recipe.parts) != {"language_model"} or recipe.preprocess:
            raise UserError(
                f"{recipe.model} is a text model",
                hint='train parts = ["language_model"] without preprocess, or start from a LLaVA',
            )
        return config
    if not recipe.preprocess:
        return config
    return dataclasses.replace(config, image=config.image.under(recipe.preprocess))


def _named_data(recipe: Recipe) -> JsonDataset:
    if not recipe.data:
        raise UserError(
            "the recipe names no data", hint="add the key `data`, a JSON file of samples, and `images`, their folder"
        )
    return JsonDataset(Path(recipe.data), Path(recipe.images))


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
        {"params": weights, "part": part, "lr": rates.get(part, recipe.rate), "peak": rates.get(part, recipe.rate)}
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


def draw(data: Dataset, step: int, recipe: Recipe, config: LlavaConfig, tokenizer: Tokenizer) -> list[Row]:
    """The batch of a step: a new shuffle for each pass over the data, the same for the same seed."""
    template = recipe.template or config.template
    rows = []
    for position in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, place = divmod(position, len(data))
        index = _shuffled(place, len(data), seed=recipe.seed + epoch)
        sample = data.sample(index)
        named = sample if sample.name else dataclasses.replace(sample, name=f"sample {index}")
        rows.append(encode(named, config, tokenizer, template=template, max_tokens=recipe.max_tokens))
    return rows


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
    network: Llava, optimiser: torch.optim.Optimizer, rows: Sequence[Row], recipe: Recipe, step: int
) -> dict[str, object]:
    """One step of the optimiser, the batch in stretches of `micro_batch`: each counts by its share of the learned
    tokens, so that their gradients add up to the whole batch's."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * rate_at(step, recipe)
    optimiser.zero_grad(set_to_none=True)
    size, learned, total = recipe.micro_batch or len(rows), sum(row.learned for row in rows), 0.0
    for start in range(0, len(rows), size):
        stretch = rows[start : start + size]
        loss = loss_of(network, collate(stretch)) * (sum(row.learned for row in stretch) / learned)
        if loss.requires_grad:  # of a stretch without a picture a projector learns nothing
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    learning = [weight for group in optimiser.param_groups for weight in group["params"]]
    if all(weight.grad is None for weight in learning):
        raise UserError(
            f"the batch of step {step} has no picture, and only {' and '.join(recipe.parts)} learns",
            hint="give samples with images, or train the language model too",
        )
    norm = float(torch.nn.utils.clip_grad_norm_(learning, recipe.clip_norm))
    if not math.isfinite(norm):
        raise UserError(f"the gradient at step {step} is {norm}", hint="begin anew with a lower learning rate")
    optimiser.step()
    rates = {group["part"]: group["lr"] for group in optimiser.param_groups}
    return {"loss": round(total, 5), "rates": rates, "norm": round(norm, 4)}
