"""Names to files. So far: folders on this disk, and the bundled pebble."""

from __future__ import annotations

import os
from pathlib import Path

from pumice.errors import UserError, nearest, shortened

BUNDLED = {"pebble": "pebble-1.6", "pebble:1.6": "pebble-1.6", "pebble:1.5": "pebble-1.5"}
"""Names of the models inside the package, and their folders."""


def resolve(name: str | Path) -> Path:
    """The folder of a model, from its name or path. A checkpoint folder of that name wins over a bundled model.

    Raises UserError, with the nearest names, where there is neither.
    """
    path = Path(os.path.expanduser(name))
    # os.path says no, where Path raises, to names that no file can have and to folders that may not be entered.
    if os.path.isdir(path) and (os.path.isfile(path / "config.json") or str(name) not in BUNDLED):
        return path
    if str(name) in BUNDLED:
        return Path(__file__).resolve().parent.parent / "pebble" / BUNDLED[str(name)]
    if os.path.isfile(path):
        return path
    if os.path.exists(path):
        raise UserError(f"{path} is no folder and no file", hint="give a checkpoint's folder or a .gguf file")
    raise UserError(f"there is no model named {shortened(str(name))} here", hint=nearest(str(name), _names_near(path)))


def _names_near(path: Path) -> list[str]:
    """Bundled names, and folders beside the missing path that look like checkpoints."""
    parent = path.parent
    if not os.path.isdir(parent):
        return list(BUNDLED)
    return [*BUNDLED, *(str(each.parent) for each in parent.glob("*/config.json")), *map(str, parent.glob("*.gguf"))]
