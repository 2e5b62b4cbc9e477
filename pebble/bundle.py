"""Step 4: put the trained forms into the package, 16 bits a weight.

python pebble/bundle.py --runs runs/pebble
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from pumice import checkpoints

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "pumice" / "pebble"
FORMS = {"pebble-1.5": "all/model", "pebble-1.6": "tiles/model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    chosen = parser.parse_args()
    for name, trained in FORMS.items():
        found = checkpoints.read(chosen.runs / trained)
        state = {each: found.tensors[each] for each in found.tensors.names()}
        shutil.rmtree(PACKAGE / name, ignore_errors=True)
        checkpoints.write_hf(PACKAGE / name, found.config, state, tokenizer_files=found.path, dtype=torch.bfloat16)
        print(PACKAGE / name, f"{sum(each.stat().st_size for each in (PACKAGE / name).iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
