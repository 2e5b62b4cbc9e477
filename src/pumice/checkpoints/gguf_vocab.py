"""The tokenizer in a GGUF file's metadata: sentencepiece's pieces, or byte-level BPE's merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pumice.checkpoints.fields import MAX_NUMBER, Fields, is_whole, shown
from pumice.errors import UserError
from pumice.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Piece, PieceModel
from pumice.tokenizer import Tokenizer

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": (_GPT_2,),
    "llama-bpe": (_LLAMA_3,),
    "llama3": (_LLAMA_3,),
    "llama-v3": (_LLAMA_3,),
    "qwen2": (_LLAMA_3.replace("{1,3}", ""),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""How a text is cut before the pairing, by `tokenizer.ggml.pre` (llama-vocab.cpp)."""
_LLAMA_3_NAMES = ("llama-bpe", "llama3", "llama-v3")

MAX_TOKENS = 2**20
END_WORDS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


def tokenizer(fields: Fields) -> Tokenizer:
    """The tokenizer of a language model file. Raises UserError for a kind that pumice does not have, or damage."""
    tokens, kinds = _tokens(fields)
    if _model(fields) == "llama":
        model, config = _sentencepiece(fields, tokens, kinds)
        return Tokenizer.from_pieces(model, config=config)
    return Tokenizer.from_json(_byte_level(fields, tokens, kinds), config=_names(fields, tokens, {}))


def tokenizer_files(fields: Fields) -> dict[str, dict[str, Any]]:
    """The same tokenizer as files for a Hugging Face folder: their names and contents."""
    tokens, kinds = _tokens(fields)
    if _model(fields) == "llama":
        model, config = _sentencepiece(fields, tokens, kinds)
        names = {name: config[name] for name in _ROLES if name in config}
        added = [{"id": int(id), **each} for id, each in config["added_tokens_decoder"].items()]
        spec = _as_transformers(model, added, config["bos_token"] if config["add_bos_token"] else None)
    else:
        names, spec = _names(fields, tokens, {}), _byte_level(fields, tokens, kinds)
    fillers = {id for id, kind in enumerate(kinds) if kind == UNUSED and tokens[id] == f"[PAD{id}]"}
    spec["model"]["vocab"] = {text: id for text, id in spec["model"]["vocab"].items() if id not in fillers}
    own: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    if "tokenizer.chat_template" in fields:
        own["chat_template"] = fields.text("tokenizer.chat_template")
    return {"tokenizer.json": spec, "tokenizer_config.json": own}


def _as_transformers(model: PieceModel, added: Sequence[dict[str, Any]], bos: str | None) -> dict[str, Any]:
    """A tokenizer.json that also says what `Tokenizer` does around the pairing: the space in front of a text."""
    spec = model.as_json(added, bos)
    if model.dummy_prefix:
        spec["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": SPACE})
        spec["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return spec


def _tokens(fields: Fields) -> tuple[list[str], list[int]]:
    tokens = _list(fields, "tokenizer.ggml.tokens", str)
    if len(set(tokens)) != len(tokens):
        raise fields.wrong("tokenizer.ggml.tokens", "tokens that differ from each other")
    return tokens, _list(fields, "tokenizer.ggml.token_type", int, like=tokens, default=NORMAL)


def _model(fields: Fields) -> str:
    name = fields.text("tokenizer.ggml.model")
    if name not in ("llama", "gpt2"):
        raise fields.wrong("tokenizer.ggml.model", "'llama' (sentencepiece) or 'gpt2' (byte-level BPE)")
    return name


def stop_ids(fields: Fields, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: the file's own, and the tokens that llama.cpp takes for ends by their text."""
    found = [fields.raw(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    ids: list[int | None] = [each for each in found if is_whole(each)]
    ids = ids or [tokenizer.eos_id]
    ids += [tokenizer.id_of(word) for word in END_WORDS]
    return tuple(dict.fromkeys(each for each in ids if each is not None and 0 <= each < tokenizer.vocab_size))


def _sentencepiece(fields: Fields, tokens: Sequence[str], kinds: Sequence[int]) -> tuple[PieceModel, dict[str, Any]]:
    """The pieces, and what a tokenizer_config.json would say beside them."""
    scores = _list(fields, "tokenizer.ggml.scores", float, like=tokens, default=0.0)
    names = _names(fields, tokens, _SENTENCEPIECE_ROLES)
    unknown = names["unk_token"]
    # A user's token is found as a whole and joined from no others, as an unused one.
    own_kinds = [UNUSED if kind == USER_DEFINED else kind for kind in kinds]
    pieces = tuple(
        Piece(text, float(score), UNKNOWN if text == unknown else kind)
        for text, score, kind in zip(tokens, scores, own_kinds, strict=True)
    )
    model = PieceModel(
        pieces,
        byte_fallback=BYTE in kinds,
        dummy_prefix=fields.flag("tokenizer.ggml.add_space_prefix", True),
        unk=unknown,
        bos=names.get("bos_token"),
        eos=names.get("eos_token"),
    )
    own = {"add_bos_token": fields.flag("tokenizer.ggml.add_bos_token", True)}
    added = _added(tokens, kinds)
    if _is_phi_3(fields):
        # They take the white space behind them, which GGUF cannot say.
        added = {id: each | {"rstrip": each["content"] not in _PHI_3_LEAVES_SPACE} for id, each in added.items()}
    return model, {**names, **own, "added_tokens_decoder": added}


_PHI_3_LEAVES_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def _is_phi_3(fields: Fields) -> bool:
    """By what llama.cpp goes by: the model's name, for Phi-3 is found under the architecture llama too."""
    return fields.raw("general.architecture") == "phi3" or names_phi_3(fields.text("general.name", ""))


def names_phi_3(name: str) -> bool:
    return "phi-3" in name.lower() or "phi3" in name.lower()


def _byte_level(fields: Fields, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    pre = fields.text("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise fields.wrong("tokenizer.ggml.pre", " or ".join(SPLITS))
    names = _names(fields, tokens, {})
    llama_3 = pre in _LLAMA_3_NAMES
    bos = names.get("bos_token") if fields.flag("tokenizer.ggml.add_bos_token", llama_3) else None
    added = _added(tokens, kinds)
    cuts = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in SPLITS[pre]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    front = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    return {
        "version": "1.0",
        "added_tokens": [{"id": int(id), **each} for id, each in added.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*front, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}} if bos else {},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {text: id for id, text in enumerate(tokens)},
            "merges": _list(fields, "tokenizer.ggml.merges", str),
            "ignore_merges": llama_3,
        },
    }


_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_ROLES = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
"""Where the file does not say."""


def _names(fields: Fields, tokens: Sequence[str], defaults: Mapping[str, int]) -> dict[str, str]:
    """The texts of the tokens with a role, under the names of tokenizer_config.json."""
    found: dict[str, str] = {}
    for name, role in _ROLES.items():
        key = f"tokenizer.ggml.{role}_token_id"
        if key in fields or name in defaults:
            found[name] = tokens[fields.whole(key, defaults.get(name), least=0, most=len(tokens) - 1)]
    return found


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Control tokens, which no text becomes, and those of a user, which are found before anything else."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        str(id): {"content": tokens[id], **flags, "special": kind == CONTROL}
        for id, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    }


def _all_of(values: list[Any], kind: type) -> bool:
    """Whether all are of a kind; numbers also within bounds. A vocabulary is long, and its types are few."""
    kinds = set(map(type, values))
    if kind is float:
        return kinds <= {int, float} and all(-MAX_NUMBER < each < MAX_NUMBER for each in values)
    return kinds == {kind}


def _list(fields: Fields, key: str, kind: type, *, like: Sequence[object] = (), default: object = None) -> list[Any]:
    """An array, each value of one kind; as long as `like` where that is given."""
    values = fields.raw(key)
    if values is None and default is not None:
        return [default] * len(like)
    if not isinstance(values, list) or not 0 < len(values) <= MAX_TOKENS or not _all_of(values, kind):
        raise fields.wrong(key, f"an array of {kind.__name__}")
    if like and len(values) != len(like):
        raise UserError(
            f"{fields.source}: {key} has {len(values)} values for {len(like)} tokens ({shown(values[:2])}…)",
            hint="the file is damaged; get it again",
        )
    return values
