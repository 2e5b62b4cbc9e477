"""Compiles Triton's kernels for GPUs that are not here, as `ops.gpu` launches them: `python tests/compiled.py 80 90`.

Each launch becomes machine code, which ptxas checks too, and nothing is run. One JSON line a kernel: bytes of shared
memory, and bytes that its registers do not hold. `--few` compiles the formats of the common files only.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from pumice.ops import gpu  # noqa: E402
from pumice.ops.pages import LayerPages  # noqa: E402
from pumice.quant import FORMATS, QTensor  # noqa: E402


class Absent:
    """A GPU that answers what a compiler asks."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def spilled(ptx: str, capability: int) -> int:
    """Bytes that a thread's registers do not hold, as ptxas says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Where there are two, Triton chooses by the GPU; the newer one takes what either does.
    ptxas = next(each for each in (tool / "ptxas-blackwell", tool / "ptxas") if each.exists())
    arch = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch}", source, "-o", Path(folder, "out")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", told)))


SHAPES = ((32, 32, 128, 1, None), (32, 8, 128, 1, 4096), (32, 8, 96, 256, None))
"""Heads, key heads, width, queries, window."""


def launches(dtypes: list[torch.dtype], formats: list[str]) -> None:
    """Everything that `gpu` launches, at the sizes of a 7B model."""
    for dtype in dtypes:
        for heads, kv_heads, width, tokens, window in SHAPES:
            q = torch.empty(2, tokens, heads, width, dtype=dtype).transpose(1, 2)
            kept = torch.empty(
                8, kv_heads, 32, width, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
            )
            pages = LayerPages(kept, kept, torch.zeros(2, 32, dtype=torch.int64))
            positions = torch.zeros(2, tokens, dtype=torch.int64)
            gpu.attention_in_pages(q, pages, positions, window, 8 if tokens == 1 else 1)
        for name in formats:
            for rows, head in ((4096, 128), (32064, 0)):
                data = torch.zeros(rows, FORMATS[name].row_bytes(512), dtype=torch.uint8)
                weight = QTensor(data, FORMATS[name], dtype, head)
                for inputs in (1, 4, gpu.MOST_WIDE_INPUTS if dtype == torch.float32 else gpu.MOST_INPUTS):
                    gpu.linear(torch.zeros(inputs, 512, dtype=dtype), weight, None)
            gpu.embed(torch.zeros(3, dtype=torch.int64), weight)


class Compiled:
    """What a kernel is replaced with: launched, it is compiled and told about."""

    def __init__(self, kernel: JITFunction, capability: int) -> None:
        self._kernel, self._capability = kernel, capability
        self._seen: set[str] = set()
        kernel.device_caches.clear()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return functools.partial(self._take, grid)

    def _take(self, grid: object, *args: object, **constants: object) -> None:
        made = self._kernel.warmup(*args, grid=grid, **constants)
        if made.hash in self._seen:
            return
        self._seen.add(made.hash)
        types = [str(each.dtype).removeprefix("torch.") for each in args if isinstance(each, torch.Tensor)]
        said = {"kernel": self._kernel.__name__, "format": constants.get("FORMAT"), "types": types}
        sizes = {"shared_bytes": made.metadata.shared, "spilled_bytes": spilled(made.asm["ptx"], self._capability)}
        print(json.dumps(said | {"for": self._capability} | sizes), flush=True)


def main(capabilities: list[int], dtypes: list[torch.dtype], formats: list[str]) -> None:
    kernels = {name: vars(gpu.kernels)[name] for name in ("attend", "join", "row_product", "product", "unpack")}
    for capability in capabilities:
        triton.runtime.driver.set_active(Absent(capability))
        for name, kernel in kernels.items():
            setattr(gpu.kernels, name, Compiled(kernel, capability))
        launches(dtypes, formats)


if __name__ == "__main__":
    few = "--few" in sys.argv
    blocks = [name for name, each in FORMATS.items() if each.dtype is None]
    types = [torch.float16] if few else [torch.float16, torch.bfloat16, torch.float32]
    given = [int(each) for each in sys.argv[1:] if each.isdecimal()]
    main(given, types, ["Q4_0", "Q6_K"] if few else blocks)
