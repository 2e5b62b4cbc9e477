"""Step 1: the vision tower alone learns to say what each patch shows.

    python pebble/tower.py --output runs/pebble/tower.pt [--steps 3000] [--threads 2]

A CLIP tower comes to LLaVA already seeing; pebble's learns it here, from the labels that drawing gives for nothing.
Muon for the matrices (Jordan et al. 2024), AdamW for the rest. Resumes from its own last state.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from draw import CLASSES, LETTERS, PLACES, TOTALS, UNKNOWN, patches, scene
from muon import Muon
from shape import MEAN, PATCH_PX, STD, TILE_PX, VISION
from torch import Tensor, nn

from pumice.network.clip import VisionTower

BATCH, RATE, MUON_RATE = 64, 1e-3, 2e-3


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Pixels (BATCH, 3, px, px) and three labels for each patch, (BATCH, patches, 3), as `draw.patches` says."""
    drawn = [_view(step * BATCH + row) for row in range(BATCH)]
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return pixels, torch.from_numpy(np.stack([labels for _, labels in drawn])).flatten(1, 2)


def _view(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Two signs for each picture of shapes.

    A whole picture, or, one time in four, the quarter of a larger one that LLaVA 1.6 sees as a tile. What lies in the
    other quarters a tile cannot tell, so places and totals are not asked there.
    """
    shown = scene(number, kind="sign" if number % 3 else "shapes")
    if number % 4:
        picture, labels = patches(shown, TILE_PX, PATCH_PX)
        return np.asarray(picture), labels
    picture, labels = patches(shown, 2 * TILE_PX, PATCH_PX)
    left, top = (TILE_PX * (number // 4 % 2), TILE_PX * (number // 8 % 2))
    side = TILE_PX // PATCH_PX
    part = labels[top // PATCH_PX :, left // PATCH_PX :][:side, :side].copy()
    part[..., 1:] = UNKNOWN
    return np.asarray(picture.crop((left, top, left + TILE_PX, top + TILE_PX))), part


def loss_of(scores_BPC: Tensor, labels_BP3: Tensor) -> Tensor:
    """Cross-entropy of the class, and half as much of place and total."""
    # Letters are what learns slowly, bare ground what needs no learning.
    weights = torch.ones(CLASSES)
    weights[0], weights[-len(LETTERS) :] = 0.3, 3.0
    kind, place, total = scores_BPC.flatten(0, 1).split((CLASSES, PLACES, TOTALS), dim=-1)
    known = labels_BP3.flatten(0, 1)
    return (
        F.cross_entropy(kind, known[:, 0], weight=weights)
        + 0.5 * F.cross_entropy(place, known[:, 1], ignore_index=UNKNOWN)
        + 0.5 * F.cross_entropy(total, known[:, 2], ignore_index=UNKNOWN)
    )


def shares(scores_BPC: Tensor, labels_BP3: Tensor) -> dict[str, float]:
    """The share of patches that are named rightly: of things, of letters; and of places and totals."""
    said = torch.stack([part.argmax(-1) for part in scores_BPC.split((CLASSES, PLACES, TOTALS), dim=-1)], dim=-1)
    right_BP3, kind_BP = said == labels_BP3, labels_BP3[..., 0]
    letter_BP, asked_BP = kind_BP >= CLASSES - len(LETTERS), labels_BP3[..., 1] != UNKNOWN
    thing_BP = (kind_BP > 0) & ~letter_BP
    return {
        "things": right_BP3[..., 0][thing_BP].float().mean().item(),
        "letters": right_BP3[..., 0][letter_BP].float().mean().item(),
        "places of letters": right_BP3[..., 1][letter_BP & asked_BP].float().mean().item(),
        "kinds counted": right_BP3[..., 1][thing_BP & asked_BP].float().mean().item(),
        "totals": right_BP3[..., 2][asked_BP].float().mean().item(),
    }


def initialised(tower: VisionTower) -> VisionTower:
    """Small random weights; layer norms start as they are."""
    for weight in tower.parameters():
        if weight.dim() > 1:
            nn.init.trunc_normal_(weight, std=0.02)
    nn.init.zeros_(tower.embeddings.class_embedding)
    return tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(1)
    tower, head = (
        initialised(VisionTower(VISION)),
        nn.Sequential(nn.LayerNorm(VISION.width), nn.Linear(VISION.width, CLASSES + PLACES + TOTALS)),
    )
    used = [
        weight
        for name, weight in tower.named_parameters()
        if f"layers.{VISION.layers - 1}." not in name and "post_" not in name
    ]
    matrices = [weight for weight in used if weight.dim() == 2]
    rest = [weight for weight in used if weight.dim() != 2] + list(head.parameters())
    optimisers = [
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(rest, lr=RATE, weight_decay=0.01),
    ]
    step = 0
    if chosen.output.exists():
        state = torch.load(chosen.output, weights_only=True)
        tower.load_state_dict(state["tower"])
        head.load_state_dict(state["head"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        step = state["step"]
    started = time.perf_counter()
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    while step < chosen.steps:
        share = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / chosen.steps)) + 0.01
        for optimiser, rate in zip(optimisers, (MUON_RATE, RATE)):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
        pixels, labels_BP3 = batch(step)
        scores_BPC = head(tower(pixels))
        loss = loss_of(scores_BPC, labels_BP3)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        if step % 50 == 0:
            rate = 50 * BATCH / (time.perf_counter() - started)
            started = time.perf_counter()
            said = ", ".join(f"{name} {share:.2f}" for name, share in shares(scores_BPC, labels_BP3).items())
            print(f"{step} loss {loss:.3f}, {said}, {rate:.0f}/s", flush=True)
        if step % 100 == 0 or step == chosen.steps:
            beside = chosen.output.with_suffix(".part")
            saved = [optimiser.state_dict() for optimiser in optimisers]
            torch.save(
                {"tower": tower.state_dict(), "head": head.state_dict(), "optimisers": saved, "step": step}, beside
            )
            os.replace(beside, chosen.output)


if __name__ == "__main__":
    main()
