"""Which prompt template a checkpoint's chat template stands for: the text is compared with known ones, never run."""

from __future__ import annotations

import hashlib
import re

# SHA-256 of a normalised chat template -> a template of `prompt`. The one of llava-v1.6-mistral ends answers in a
# literal `<\s>`; mistral_instruct is equal in the first turn, and in later ones what the model was trained on. Phi-3's
# changed four times, not in what they make of a question; whether a prompt begins with <s> is left to the tokenizer.
_FINGERPRINTS = {
    "319d20b0937f4704237326d4529bd25794db18607c6e15b6ef9df56f297c615b": "hf_vicuna",
    "937ee8700b6ef6cef87ac884dee13d2de9f5cbe2fdaea851b47b2226f6da49fe": "mistral_instruct",
    "c056adeea89d896ac103ff8bbcde39bd6ef519e06a018634a843cb00bd08b769": "hf_llama3",
    "444fc95ce2aab1372b4975cda99a813c8663efcfe43d00a4745a2b3b9d8bf17e": "hf_chatml",
    "9384743fdd6867393aacb6fa3bcbf34c52ebafe16914867d7c635e9c2d8e216f": "phi3",
    "52ffb52538bea37bda38ffe3e25733cdda852e9aefbc8e211f3d00b4458848f9": "phi3",
    "6b8d781a0529868b4529b6460651f3c1d2d7f59e5d7cc0ceeb296767772ce8d2": "phi3",
    "6ad7332629320d5597b3b0fe3bc6751351c76fa94df75f274598f2c2749c0854": "phi3",
    "8f57e2188119ea1ef7a98d963efaef6bb08f416f9f2e0672c470322184b443e2": "phi3",
}


def template_for(jinja: str) -> str | None:
    """The template that a known chat template stands for, or None. The text is compared, never evaluated."""
    if len(jinja) > 8000:  # several times the longest known one; bounds the work
        return None
    return _FINGERPRINTS.get(hashlib.sha256(_normalised(jinja).encode()).hexdigest())


def _normalised(jinja: str) -> str:
    """A chat template without what changes nothing in its output as Transformers renders it: comments, `generation`
    tags, white space that `trim_blocks`, `lstrip_blocks` and `-` remove, white space and quote style inside tags."""
    text = re.sub(r"\{#.*?#\}\n?", "", jinja.replace("\\n", "\n"), flags=re.DOTALL)
    text = re.sub(r"\s*(\{[{%])-", r"\1", text)
    text = re.sub(r"-([%}]\})\s*", r"\1", text)
    text = re.sub(r"(?m)^[ \t]+(?=\{%)", "", text).replace("%}\n", "%}")
    tags = re.split(r"(\{[{%].*?[%}]\})", text.strip(), flags=re.DOTALL)
    tags[1::2] = [re.sub(r"""('[^']*'|"[^"]*")|\s+""", _quoted, tag) for tag in tags[1::2]]
    return re.sub(r"\{%(end)?generation%\}", "", "".join(tags))


def _quoted(found: re.Match[str]) -> str:
    return f"'{found[1][1:-1]}'" if found[1] else ""
