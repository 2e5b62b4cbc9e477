"""Where a quality card stands in a GGUF file: a string of one length in its metadata, to be filled in place later."""

from __future__ import annotations

CARD_KEY = "pumice.card"
CARD_BYTES = 4096
