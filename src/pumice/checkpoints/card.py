"""Where a quality card stands in a GGUF file's metadata: a string of one length, so that it can be put in place later."""

from __future__ import annotations

CARD_KEY = "pumice.card"
CARD_BYTES = 4096
