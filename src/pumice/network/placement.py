"""Which part of a network lies on which device, where the GPU does not hold all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from pumice.errors import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """device: of everything, or of everything but the embeddings and the language model's first `border` blocks, which
    are then the CPU's."""

    device: torch.device
    border: int = 0

    @classmethod
    def of_layers(cls, device: torch.device, layers: int, gpu_layers: int | None) -> Placement:
        """By llama.cpp's count (b11434, llama-model.cpp: load_tensors): the head is the first of the layers that go to
        the GPU, then the blocks, the last first; with one more than there are blocks all are there, and then pumice
        puts the embeddings there too. None is all. The eyes go with the head.

        Raises UserError: no such number, layers for a GPU where the device is none.
        """
        if gpu_layers is None:
            return cls(device)
        if isinstance(gpu_layers, bool) or not isinstance(gpu_layers, int) or gpu_layers < 0:
            raise UserError(f"gpu_layers is {gpu_layers!r:.100}", hint="give a whole number from 0, or leave it out")
        if gpu_layers == 0:
            return cls(CPU)
        if device.type == "cpu":
            raise UserError(
                f"{gpu_layers} layers are to lie on a GPU, and the device is the CPU",
                hint="leave --gpu-layers out, or name a GPU with --device",
            )
        return cls(device, max(0, layers + 1 - gpu_layers))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (self.device, CPU) if self.border else (self.device,)

    def of(self, name: str) -> torch.device:
        """Where a tensor lies."""
        block = re.match(r"language_model\.layers\.(\d+)\.", name)
        first = int(block[1]) < self.border if block else name.startswith("language_model.embed_tokens.")
        return CPU if self.border and first else self.device
