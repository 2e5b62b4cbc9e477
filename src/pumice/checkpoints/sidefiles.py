"""What stands beside the weights: which tokens end an answer, and which template makes a prompt."""

from __future__ import annotations

from pathlib import Path

from pumice import prompt
from pumice.chat_template import template_for
from pumice.checkpoints.fields import Fields, json_if_there
from pumice.errors import UserError, nearest
from pumice.tokenizer import Tokenizer

TEMPLATE_KEY = "pumice_template"
"""In a config.json that pumice wrote: the template's name, for most templates have no chat template to be known by."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

MAX_TEMPLATE_BYTES = 2**20


def stop_ids(generation: Fields, configs: tuple[Fields, ...], tokenizer: Tokenizer, vocab: int) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json, else the first config that has one, else the tokenizer's."""
    for fields in (generation, *configs):
        if found := fields.wholes("eos_token_id", least=0, most=vocab - 1):
            return found
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def template_name(given: str | None, folder: Path, config: Fields) -> str | None:
    """The template that was asked for, or that the folder's files name. None when they say nothing.

    Raises UserError for an unknown name, and for a chat template that is not among the known ones.
    """
    if given is None and TEMPLATE_KEY in config:
        return _known(config.text(TEMPLATE_KEY))
    return known_template(given, chat_template(folder) if given is None else None, folder)


def known_template(given: str | None, chat_template: str | None, source: Path) -> str | None:
    """The template that was asked for, or that a chat template stands for. Raises UserError for an unknown one."""
    if given is not None:
        return _known(given)
    if chat_template is None:
        return None
    name = template_for(chat_template)
    if name is None:
        raise UserError(
            f"{source} has a chat template that pumice does not know; it is compared with known ones and never run",
            hint=f"name the format with template= or --template: {', '.join(prompt.TEMPLATES)}",
        )
    return name


def chat_template(folder: Path) -> str | None:
    """The text of the folder's chat template, from where Transformers looks for it, in its order."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        with plain.open("rb") as file:
            return file.read(MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        value = json_if_there(folder / name).raw("chat_template")
        if isinstance(value, list):  # several, by name
            named = [each for each in value if isinstance(each, dict) and each.get("name") == "default"]
            value = named[0].get("template") if named else None
        if isinstance(value, str):
            return value
    return None


def usual_template(kind: str, stops: tuple[int, ...], tokenizer: Tokenizer) -> str:
    """The template of a folder that names none: by the token that ends an answer, then by the language model."""
    if kind == "qwen2":
        return "qwen_1_5"
    if "<|im_end|>" in [tokenizer.token_of(stop) for stop in stops]:
        return "chatml_direct"
    if tokenizer.id_of("<|end|>") is not None and tokenizer.id_of("<|assistant|>") is not None:
        return "phi3"
    if tokenizer.id_of("<|eot_id|>") is not None:
        return "llava_llama_3"
    return "mistral_instruct" if kind == "mistral" else "vicuna_v1"


def _known(name: str) -> str:
    if name not in prompt.TEMPLATES:
        raise UserError(f"there is no prompt template named {name!r}", hint=nearest(name, prompt.TEMPLATES))
    return prompt.TEMPLATES[name].name
