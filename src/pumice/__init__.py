"""LLaVA, whole: ask an image a question. The names below are the public ones; they load when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pumice.answer import Answer
    from pumice.classification import Classification, Labelling
    from pumice.conversation import Chat
    from pumice.conversion import convert
    from pumice.engine import Limits
    from pumice.engine.form import Form
    from pumice.engine.sampling import Sampling
    from pumice.errors import UserError
    from pumice.model import Model, load
    from pumice.question import Exchange, Question
    from pumice.tasks.calibration import Calibration, calibrate
    from pumice.tasks.card import Card
    from pumice.tasks.verify import save_values, verify

__all__ = [
    "Answer",
    "Calibration",
    "Card",
    "Chat",
    "Classification",
    "Exchange",
    "Form",
    "Labelling",
    "Limits",
    "Model",
    "Question",
    "Sampling",
    "UserError",
    "calibrate",
    "convert",
    "load",
    "save_values",
    "verify",
]

_HOMES = {
    "Answer": "pumice.answer",
    "Calibration": "pumice.tasks.calibration",
    "Card": "pumice.tasks.card",
    "Chat": "pumice.conversation",
    "Classification": "pumice.classification",
    "Exchange": "pumice.question",
    "Form": "pumice.engine.form",
    "Labelling": "pumice.classification",
    "Limits": "pumice.engine",
    "Question": "pumice.question",
    "Sampling": "pumice.engine.sampling",
    "UserError": "pumice.errors",
    "calibrate": "pumice.tasks.calibration",
    "convert": "pumice.conversion",
    "save_values": "pumice.tasks.verify",
    "verify": "pumice.tasks.verify",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import pumice` and `pumice --help` do not load torch."""
    if name not in __all__:
        raise AttributeError(f"module 'pumice' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "pumice.model")), name)
