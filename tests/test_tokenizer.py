"""Ids and text against what the references computed, against sentencepiece, and against the `tokenizers` library."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto

from conftest import HERE, reference
from pumice.decoding import StopText
from pumice.errors import UserError
from pumice.prompt import SPECIAL_WORDS, TEMPLATES, Message, Part, messages_from_llava, render, split_raw
from pumice.tokenizer import Encoded, Tokenizer

GOLDEN = HERE / "golden"
TINY_JSON, TINY_MODEL = GOLDEN / "token_tiny.json", GOLDEN / "token_tiny.model"
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@functools.cache
def tiny(kind: str = "json") -> Tokenizer:
    if kind == "json":
        return Tokenizer.from_json(TINY_JSON, config=ENDS)
    return Tokenizer.from_sentencepiece(TINY_MODEL, config={"legacy": kind == "legacy"})


@functools.cache
def tiny_library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TINY_JSON))


def raw(tokenizer: Tokenizer, text: str, *, image_id: int, features: int = 1) -> Encoded:
    return tokenizer.encode_raw(split_raw(text), [features] * text.count("<image>"), image_id=image_id)


def spans(learned: list[bool]) -> list[list[int]]:
    """Half-open spans of what is true."""
    runs, at = [], 0
    for value, run in itertools.groupby(learned):
        size = len(list(run))
        runs += [[at, at + size]] if value else []
        at += size
    return runs


# Vocabularies of Llama 2 and 3, from the GGUF files of llama.cpp.


@functools.cache
def gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file. The `gguf` package takes half a minute for the larger one."""
    data, at = path.read_bytes(), 24
    (count,) = struct.unpack_from("<Q", data, 16)
    formats = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

    def text() -> str:
        nonlocal at
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8 + size
        return data[at - size : at].decode()

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            return text()
        if kind == 9:
            inner, size = struct.unpack_from("<IQ", data, at)
            at += 12
            return [value(inner) for _ in range(size)]
        at += struct.calcsize(formats[kind])
        return struct.unpack_from(formats[kind], data, at - struct.calcsize(formats[kind]))[0]

    found = {}
    for _ in range(count):
        key = text()
        at += 4
        found[key] = value(struct.unpack_from("<I", data, at - 4)[0])
    return found


def vocabulary(name: str) -> tuple[list[str], list[int], dict[str, Any]]:
    found = gguf(reference(f"data/vocab/ggml-vocab-{name}.gguf"))
    return found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], found


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's texts and the ids that Transformers gave for them, without BOS."""
    file = reference(f"data/vocab/ggml-vocab-{name}.gguf.inp")
    texts = file.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = file.with_suffix(".out").read_text(encoding="utf-8").splitlines()
    return [(text, [int(id) for id in line.split()]) for text, line in zip(texts, lines, strict=False)]


def model_proto(pieces: list[tuple[str, float, int]], **normalizer: object) -> proto.ModelProto:
    model = proto.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    rules = {"name": "identity", "remove_extra_whitespaces": False, **normalizer}
    for name, value in rules.items():
        setattr(model.normalizer_spec, name, value)
    return model


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, kinds, found = vocabulary("llama-spm")
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.model"
    scores = found["tokenizer.ggml.scores"]
    path.write_bytes(model_proto(list(zip(tokens, scores, kinds, strict=True))).SerializeToString())
    return path


@pytest.fixture(scope="module")
def slow(llama2: Path) -> dict[str, Tokenizer]:
    return {
        "legacy": Tokenizer.from_sentencepiece(llama2),
        "nonlegacy": Tokenizer.from_sentencepiece(llama2, config={"legacy": False}),
    }


@pytest.fixture(scope="module")
def llama2_hf() -> Tokenizer:
    """tokenizer.json as transformers 4.37 writes it, with LLaVA's `<image>` and `<pad>`."""
    tokens, _, found = vocabulary("llama-spm")
    scores, ids = found["tokenizer.ggml.scores"], {token: id for id, token in enumerate(tokens)}
    pairs = [
        (scores[id], len(token[:cut]), f"{token[:cut]} {token[cut:]}")
        for id, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    spec["model"] |= {"vocab": ids, "merges": [pair for *_, pair in sorted(pairs, reverse=True)]}
    for token in spec["added_tokens"]:
        token["id"] = {"<image>": 32000, "<pad>": 32001}.get(token["content"], token["id"])
    return Tokenizer.from_json(json.dumps(spec), config=ENDS)


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    tokens, kinds, found = vocabulary("llama-bpe")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos, single = tokens[128000], [{"Sequence": {"id": "A", "type_id": 0}}]
    spec = {
        "added_tokens": [{"id": id, "content": tokens[id], **flags} for id, kind in enumerate(kinds) if kind == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, *single],
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [128000], "tokens": [bos]}},
        },
        "decoder": levels,
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens) if kinds[id] == 1},
            "merges": found["tokenizer.ggml.merges"],
            "ignore_merges": True,
        },
    }
    return Tokenizer.from_json(json.dumps(spec), config={"bos_token": bos, "eos_token": "<|eot_id|>"})


def test_llama2_vectors(slow: dict[str, Tokenizer], llama2_hf: Tokenizer) -> None:
    for text, ids in vectors("llama-spm"):
        for tokenizer in (slow["legacy"], llama2_hf):
            assert tokenizer.encode([Part("text", text)], [], image_id=-200).ids == [1, *ids], text


def test_llama3_vectors(llama3: Tokenizer) -> None:
    assert (llama3.bos_id, llama3.eos_id, llama3.vocab_size) == (128000, 128009, 128256)
    for text, ids in vectors("llama-bpe"):
        assert llama3.encode([Part("text", text)], [], image_id=-200).ids == [128000, *ids], text
        assert llama3.decode(ids) == text


def test_llama3_template(llama3: Tokenizer) -> None:
    """The template writes BOS itself; it is not doubled. 271 is the blank line after a header."""
    parts = render("llama_3", [Message("system", "s"), Message("user", "<|eot_id|>", 1)])
    encoded = llama3.encode(parts, [2], image_id=-200)
    assert encoded.ids[:8] == [128000, 128006, 9125, 128007, 271, 82, 128009, 128006]
    assert encoded.ids[-4:] == [128006, 78191, 128007, 271]
    assert encoded.ids.count(128009) == 2
    assert encoded.images == [(11, 2)]


def test_every_text_of_the_original(slow: dict[str, Tokenizer], llama2_hf: Tokenizer) -> None:
    """tokenizer_image_token of the authors with both slow tokenizers, and LlavaProcessor with tokenizer.json."""
    for entry in json.loads(reference("golden/tokens.json").read_text(encoding="utf-8"))["entries"]:
        text, ids = entry["text"], {"legacy": entry["slow_legacy"]}
        ids["nonlegacy"] = entry.get("slow_nonlegacy", ids["legacy"])
        decoded = {"legacy": entry["decode"], "nonlegacy": entry.get("decode_nonlegacy", entry["decode"])}
        for kind, tokenizer in slow.items():
            assert raw(tokenizer, text, image_id=-200).ids == ids[kind], (kind, text)
            assert tokenizer.decode(ids[kind]) == decoded[kind], (kind, text)
        expected = entry["hf"]
        assert raw(llama2_hf, text, image_id=32000).ids == expected["ids"], text
        expanded = raw(llama2_hf, text, image_id=32000, features=576)
        assert [list(span) for span in expanded.images] == expected["spans"]
        assert len(expanded.ids) == expected["length"]
        packed = struct.pack(f"<{len(expanded.ids)}i", *expanded.ids)
        assert hashlib.sha256(packed).hexdigest().startswith(expected["sha256_16"])


# Where training differs from the original, and why. Samples without a note are equal in every id and every span.
MASKED_THERE = {
    # The original counts tokens a second time, round by round; where the count is off it masks the whole sample.
    "empty-question-second": "its rounds are cut at an empty question",
    "sep-in-answer": "the answer holds ` ASSISTANT: `",
    "inst-in-answer": "the answer holds `[/INST]`",
}
TEXT_HERE = {
    "eos-in-answer": "a literal </s> is text here, and a special token there",
    "eos-in-question": "the same",
    "unk-in-question": "a literal <unk> is text here, and the padding there",
    "image-in-answer": "a literal <image> in an answer is text here, and a second image there",
    "odd-turns": "a question without an answer is left out here",
}


def test_labels_are_those_of_the_original(slow: dict[str, Tokenizer]) -> None:
    golden = json.loads(reference("golden/labels.json").read_text(encoding="utf-8"))
    samples, equal = {each["id"]: each for each in golden["samples"]}, 0
    for entry in golden["entries"]:
        name, template, sample = entry["sample"], entry["template"], samples[entry["sample"]]
        if "error" in entry:
            with pytest.raises(UserError):
                messages_from_llava(sample["conversations"], has_image=sample["image"])
            continue
        parts = render(template, messages_from_llava(sample["conversations"], has_image=sample["image"]))
        images = [1] * sum(part.kind == "image" for part in parts)
        encoded = slow[entry["tokenizer"]].encode(parts, images, image_id=-200)
        mine = spans(encoded.learned)
        if name in TEXT_HERE:
            assert encoded.ids != entry["ids"]
            assert mine
        elif template == "llava_v0":
            # Its training code writes other text than its prompts have (`\n\n### Human: `). Here both are the prompt's.
            assert encoded.ids[:31] == entry["ids"][:31]
        elif template == "chatml_direct" or (name in MASKED_THERE and "warning" in entry):
            # chatml_direct: an id is never counted there, so every answer is masked, and the line end of none is not.
            assert encoded.ids == entry["ids"]
            assert bool(mine) == (name != "empty-answer")
        else:
            limit = entry.get("model_max_length", 2048) if not sample["image"] else 2048
            assert encoded.ids[:limit] == entry["ids"], entry
            assert spans(encoded.learned[:limit]) == entry["trained"], entry
            equal += 1
    assert equal > 90


def test_learned_spans_of_what_the_original_loses(slow: dict[str, Tokenizer]) -> None:
    """An answer that holds a separator, a special word or nothing before it is trained from its space to its end."""
    golden = json.loads(reference("golden/labels.json").read_text(encoding="utf-8"))
    samples = {each["id"]: each for each in golden["samples"]}
    expected = {"sep-in-answer": "USER: hi ASSISTANT: hello there", "eos-in-answer": "Use </s> to end."}
    for name, answer in expected.items():
        parts = render("v1", messages_from_llava(samples[name]["conversations"], has_image=True))
        encoded = slow["legacy"].encode(parts, [1], image_id=-200)
        learned = [id for id, is_learned in zip(encoded.ids, encoded.learned, strict=True) if is_learned]
        assert learned[-1] == 2
        assert learned.count(2) == 1
        assert slow["legacy"].decode(learned) == answer


# Tiny vocabularies.


def test_prompts_and_answers_of_tiny_models() -> None:
    golden = json.loads((GOLDEN / "token_texts.json").read_text(encoding="utf-8"))
    for sample in golden["samples"]:
        expanded = sample["input_ids"].count(400) // max(1, sample["images"])
        assert raw(tiny(), sample["prompt"], image_id=400, features=expanded).ids == sample["input_ids"]
        assert tiny().decode(sample["greedy"]) == sample["text"]
        original = sample.get("original")
        if original and "greedy" in original:
            assert raw(tiny("legacy"), sample["prompt"], image_id=-200).ids == original["input_ids"]
            assert tiny("legacy").decode(original["greedy"]).strip() == original["text"]


def test_every_tiny_folder_of_the_reference() -> None:
    golden = json.loads(reference("golden/generate.json").read_text(encoding="utf-8"))
    for model in golden["models"]:
        folder = reference(f"golden/models/{model['name']}")
        tokenizer, library = (
            Tokenizer.from_folder(folder),
            tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
        )
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert tokenizer.bos_id == library.token_to_id(config["bos_token"])
        assert tokenizer.eos_id == library.token_to_id(config["eos_token"])
        assert tokenizer.pad_id == library.token_to_id(config["pad_token"])
        assert tokenizer.vocab_size == library.get_vocab_size()
        for sample in model["samples"]:
            assert tokenizer.decode(sample["greedy"]) == sample["text"]
    for folder in sorted(reference("golden/models-original").glob("*-tiny")):
        assert Tokenizer.from_folder(folder).encode([Part("text", "What")], [], image_id=-200).ids == [1, 294]


PIECES = [
    "What",
    "USER:",
    " ",
    "  ",
    "\n",
    "the sign",
    "é",
    "🍎",
    "▁",
    "a",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<pad>",
    "x",
]
TEXTS = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)).filter(
    lambda text: text.isprintable() or "\n" in text
)
IDS = st.lists(st.integers(-1, 460), max_size=14)


@settings(deadline=None)
@given(TEXTS)
def test_raw_text_is_what_the_library_makes_of_it(text: str) -> None:
    library = tiny_library()
    assert raw(tiny(), text, image_id=400).ids == library.encode(text).ids


@settings(deadline=None)
@given(TEXTS)
def test_text_is_what_sentencepiece_makes_of_it(text: str) -> None:
    oracle = SentencePieceProcessor(str(TINY_MODEL))
    for kind in ("json", "legacy"):
        assert tiny(kind).encode([Part("text", text)], [], image_id=-200).ids == [1, *oracle.encode(text)]


@settings(deadline=None)
@given(IDS)
def test_decoding_is_what_the_library_and_sentencepiece_do(ids: list[int]) -> None:
    library, oracle = tiny_library(), SentencePieceProcessor(str(TINY_MODEL))
    assert tiny().decode(ids) == library.decode([id for id in ids if id >= 0])
    # transformers 4.37.2 LlamaTokenizer: one space mark goes from the first piece, then sentencepiece decodes.
    pieces = [oracle.id_to_piece(id) for id in ids if 3 <= id < oracle.get_piece_size()]
    if pieces and pieces[0].startswith("▁"):
        pieces[0] = pieces[0][1:]
    assert tiny("legacy").decode(ids) == oracle.decode(pieces)


@pytest.mark.parametrize("kind", ["json", "legacy", "nonlegacy"])
@settings(deadline=None)
@given(ids=IDS)
def test_a_stream_is_the_decoded_text_in_pieces(kind: str, ids: list[int]) -> None:
    stream = tiny(kind).stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tiny(kind).decode(ids)


@pytest.mark.parametrize("kind", ["json", "legacy", "nonlegacy"])
@settings(deadline=None)
@given(text=st.text(max_size=12).filter(str.isprintable))
def test_text_comes_back(kind: str, text: str) -> None:
    text = text.replace("▁", " ").lstrip()
    ids = tiny(kind).encode([Part("text", text)], [], image_id=-200).ids
    assert tiny(kind).decode(ids) == text


def test_spaces_at_the_front_of_an_answer() -> None:
    """As decode and decode_nonlegacy of the reference have it: `▁`, `▁the` is "the", and " the" without legacy."""
    assert {kind: tiny(kind).decode([356, 263]) for kind in ("json", "legacy", "nonlegacy")} == {
        "json": " the", "legacy": "the", "nonlegacy": " the",
    }  # fmt: skip


def test_where_text_gets_a_space_in_front() -> None:
    """Legacy: every stretch. Not legacy: the first after an image or at the start, not one after a special token."""
    text = "a</s>a<image>a</s>a"
    assert raw(tiny("legacy"), text, image_id=-200).ids == [1, 261, 2, 261, -200, 261, 2, 261]
    assert raw(tiny("nonlegacy"), text, image_id=-200).ids == [1, 261, 2, 360, -200, 261, 2, 360]


def test_bos_is_not_doubled_but_where_a_raw_prompt_says_so() -> None:
    assert tiny().encode([Part("special", "<s>"), Part("text", "a")], [], image_id=400).ids == [1, 261]
    assert raw(tiny(), "<s>a", image_id=400).ids == [1, 1, 261]
    assert tiny().encode([Part("text", "<s>")], [], image_id=400).ids.count(1) == 1


def test_a_stream_never_shows_half_a_character() -> None:
    text = "the 🍎 这 é"
    for kind in ("json", "legacy", "nonlegacy"):
        stream = tiny(kind).stream()
        ids = tiny(kind).encode([Part("text", text)], [], image_id=-200).ids
        shown = list(itertools.accumulate(stream.push(id) for id in ids))
        assert all(text.startswith(each) for each in shown)
        assert shown[-1] + stream.finish() == text
        assert set(shown) >= {"the", "the 🍎 "}


def test_streaming_takes_the_same_time_for_every_token() -> None:
    """Twenty thousand bytes of a character that never ends: a quadratic stream would take minutes."""
    start, stream = time.process_time(), tiny().stream()
    for _ in range(20_000):
        stream.push(3 + 0x80)
    assert stream.finish() == "\ufffd" * 20_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("kind", ["json", "legacy", "nonlegacy"])
@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"plain", "v0_plain"}))
@settings(max_examples=10, deadline=None)
@given(words=st.lists(st.sampled_from([*SPECIAL_WORDS, "<image>", "<unk>", "<pad>", "x", " "]), min_size=1, max_size=5))
def test_a_persons_text_never_becomes_a_special_id(kind: str, template: str, words: list[str]) -> None:
    tokenizer = tiny(kind)

    def specials(text: str) -> list[int]:
        turns = [Message("user", text, 1), Message("assistant", text), Message("user", text)]
        ids = tokenizer.encode(render(template, turns), [3], image_id=400).ids
        return [id for id in ids if id in (0, 1, 2, 400, 401)]

    assert specials("".join(words)) == specials("x")
    assert specials("x").count(400) == 3


def test_user_defined_symbols_are_found_first(tmp_path: Path) -> None:
    """Against sentencepiece itself; but one that a template uses as a special token is text in a person's words."""
    small = proto.ModelProto.FromString(TINY_MODEL.read_bytes())
    pieces = [(piece.piece, piece.score, piece.type) for piece in small.pieces]
    pieces += [("<sep>", 0.0, 4), ("▁the▁x", 0.0, 4), ("<|im_end|>", 0.0, 4), ("Dk", -1000.0, 3), ("DkH", -1001.0, 1)]
    for dummy in (True, False):
        path = tmp_path / f"{dummy}.model"
        path.write_bytes(model_proto(pieces, add_dummy_prefix=dummy).SerializeToString())
        tokenizer, oracle = Tokenizer.from_sentencepiece(path), SentencePieceProcessor(str(path))
        for text in ("a<sep>the sign", "<sep>", "see the x", "the x", " <sep> a", "DkH"):
            assert tokenizer.encode([Part("text", text)], [], image_id=-200).ids == [1, *oracle.encode(text)], text
        assert tokenizer.id_of("<|im_end|>") == 402
        assert 402 not in tokenizer.encode([Part("text", "a<|im_end|>")], [], image_id=-200).ids
        assert tokenizer.encode([Part("special", "<|im_end|>")], [], image_id=-200).ids == [1, 402]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_is_what_the_library_does(scheme: str) -> None:
    """Newer folders of Transformers have a pre-tokeniser instead of a normaliser (`legacy` false: `first`)."""
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    text = json.dumps(spec | {"normalizer": None, "pre_tokenizer": metaspace})
    tokenizer, library = Tokenizer.from_json(text, config=ENDS), tokenizers.Tokenizer.from_str(text)
    for sample in ("the sign", " the", "</s>USER: a", "a</s>USER", "<image>\nWhat<image>x", "", "▁a</s> a"):
        assert raw(tokenizer, sample, image_id=400).ids == library.encode(sample).ids, sample


def test_plain_added_tokens_count_in_a_persons_text() -> None:
    """Those that are not special, and that no template uses: they are words of the vocabulary."""
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"] += [{"id": 402, "content": "<box>", **flags}, {"id": 403, "content": "<|im_end|>", **flags}]
    spec["added_tokens"] += [{"id": 404, "content": "<box>the", **flags}]
    text = json.dumps(spec)
    tokenizer, library = Tokenizer.from_json(text, config=ENDS), tokenizers.Tokenizer.from_str(text)
    for sample in ("a<box>the sign", "<box>", " <box> "):
        assert tokenizer.encode([Part("text", sample)], [], image_id=400).ids == library.encode(sample).ids
    assert 403 not in tokenizer.encode([Part("text", "<|im_end|>")], [], image_id=400).ids
    assert tokenizer.decode([260, 402]) == "t<box>"


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<end>"},
        {"eos_token": {"content": "<end>"}},
        {"additional_special_tokens": ["<end>"]},
        {"added_tokens_decoder": {"402": {"content": "<end>", "special": True}}},
    ],
)
def test_a_token_that_the_config_calls_special_is_special(config: dict[str, Any]) -> None:
    """Even where tokenizer.json calls it ordinary: Transformers skips it in an answer, and no person can write it."""
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"].append({"id": 402, "content": "<end>", **flags})
    tokenizer = Tokenizer.from_json(json.dumps(spec), config=config)
    assert 402 not in tokenizer.encode([Part("text", "a<end>b")], [], image_id=400).ids
    assert tokenizer.decode([260, 402]) == "t"


def test_a_decoder_in_nested_sequences_is_the_flat_one() -> None:
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    *inner, strip = spec["decoder"]["decoders"]
    nested = {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": inner}, strip]}
    tokenizer = Tokenizer.from_json(json.dumps(spec | {"decoder": nested}), config=ENDS)
    assert tokenizer.decode([294, 260]) == tiny().decode([294, 260])


def test_a_pattern_that_never_ends_is_a_user_error() -> None:
    """The regular expression library gives up after a while, in a way of its own."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.from_json(changed(pre_tokenizer=split), config=ENDS)
    with pytest.raises(UserError, match="does not hold together"):
        raw(tokenizer, "a" * 40 + "!", image_id=400)


def test_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    """As in the authors' folders: a tokenizer.model, and the rest in side files."""
    (tmp_path / "tokenizer.model").write_bytes(TINY_MODEL.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<image>": 404}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}}')
    declared = {"402": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": declared, "add_bos_token": False})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 402, None)
    assert (tokenizer.adds_bos, tokenizer.vocab_size, tokenizer.token_of(403)) == (False, 405, "")
    assert raw(tokenizer, "a<|im_end|><image>", image_id=404, features=2).ids == [261, 402, 404, 404]
    assert tokenizer.decode([261, 402, 404]) == "a"


def test_id_and_token() -> None:
    assert tiny().id_of("▁What") == 294
    assert tiny().token_of(294) == "▁What"
    assert tiny().id_of("nothing") is None
    assert tiny().token_of(-200) == tiny().token_of(447) == ""


# Bad input.


def damaged_models() -> dict[str, bytes]:
    good = TINY_MODEL.read_bytes()
    small = proto.ModelProto.FromString(good)
    pieces = [(piece.piece, piece.score, piece.type) for piece in small.pieces]
    unigram = model_proto(pieces)
    unigram.trainer_spec.model_type = 1
    return {
        "has no pieces": b"",
        "ends in the middle|are left": good[:3000],
        "says it has 1000000000 bytes": b"\x0a\x80\x94\xeb\xdc\x03abc",
        "too long": b"\x0a" + b"\xff" * 30,
        "wire type": b"\x0b",
        "unigram": unigram.SerializeToString(),
        "'nmt_nfkc'": model_proto(pieces, name="nmt_nfkc", precompiled_charsmap=b"xx").SerializeToString(),
        "changes the text": model_proto(pieces, remove_extra_whitespaces=True).SerializeToString(),
        "twice": model_proto([*pieces, ("the", 0.0, 1), ("the", 0.0, 1)]).SerializeToString(),
        "unknown text": model_proto(pieces[3:]).SerializeToString(),
        "no number": model_proto([*pieces, ("new", float("nan"), 1)]).SerializeToString(),
        "utf-8": b"\x0a\x03\x0a\x01\xff",
        "5000 characters": model_proto([*pieces, ("a" * 5000, 0.0, 1)]).SerializeToString(),
    }


@pytest.mark.parametrize("words", damaged_models())
def test_damaged_models_are_refused(words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(damaged_models()[words])
    with pytest.raises(UserError, match=words):
        Tokenizer.from_folder(tmp_path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 6152), byte=st.integers(0, 255), cut=st.booleans())
def test_a_model_with_one_wrong_byte_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    good, path = TINY_MODEL.read_bytes(), tmp_path_factory.getbasetemp() / "wrong.model"
    path.write_bytes(good[:at] if cut else good[:at] + bytes([byte]) + good[at + 1 :])
    with contextlib.suppress(UserError):
        Tokenizer.from_sentencepiece(path)


def changed(**fields: object) -> str:
    return json.dumps(json.loads(TINY_JSON.read_text(encoding="utf-8")) | fields)


DAMAGED_JSON = {
    "not JSON, or not whole": TINY_JSON.read_text(encoding="utf-8")[:3000],
    "not JSON": '{"model":' + "[" * 200_000,
    "of kind None": "{}",
    "of kind 'WordPiece'": changed(model={"type": "WordPiece", "vocab": {}}),
    "is of no tokens": changed(model={"type": "BPE", "vocab": {"a": 0, "ab": 1}, "merges": [["a", "b"]]}),
    "a merge is 'a'": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}),
    "no merges": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": 1}),
    "does not hold together": changed(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "gives no token": changed(model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}),
    "no vocabulary": changed(model={"type": "BPE", "vocab": {}, "merges": []}),
    "normalizer of type 'Precompiled'": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}),
    "pre_tokenizer of type 'FixedLength'": changed(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "has a dropout": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}),
    "a step that is none": changed(normalizer={"prepend": "▁"}),
    "wraps a prompt": changed(post_processor={"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}),
    "decodes by WordPiece": changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "decodes by nothing": changed(decoder=None),
    "puts spaces": changed(normalizer={"type": "Prepend", "prepend": "x"}),
    "bos_token is '<start>'|is '<start>'": "bos",
    "gives '<image>' the id 7": "ids",
    "added_tokens_decoder": "decoder",
    "an added token has the id": "added",
}


@pytest.mark.parametrize("words", DAMAGED_JSON)
def test_damaged_json_is_refused(words: str, capfd: pytest.CaptureFixture[str]) -> None:
    configs: dict[str, dict[str, Any]] = {
        "bos": {"eos_token": "<start>"},
        "ids": {"added_tokens_decoder": {"7": {"content": "<image>"}}},
        "decoder": {"added_tokens_decoder": {"x": {}}},
        "added": {"added_tokens_decoder": {"500": {"content": 3}}},
    }
    text = DAMAGED_JSON[words]
    config = configs.get(text, {})
    with pytest.raises(UserError, match=words):
        Tokenizer.from_json(changed() if config else text, config=config)
    assert capfd.readouterr().err == "", "the library has a voice of its own"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match="no file"):
        Tokenizer.from_json(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(TINY_MODEL.read_bytes())
    (tmp_path / "added_tokens.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 5}')
    with pytest.raises(UserError, match="has id 5"):
        Tokenizer.from_folder(tmp_path)


def test_pictures_and_their_places_must_be_as_many() -> None:
    with pytest.raises(UserError, match="1 images, and 2 came"):
        tiny().encode([Part("image")], [4, 4], image_id=400)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="surrogate"):
        tiny().encode([Part("text", "a\ud83c")], [], image_id=400)


def test_a_vocabulary_that_spells_special_tokens_is_refused() -> None:
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    spec["model"]["vocab"] |= {"hi": 402}
    spec["model"]["merges"].append("h i")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"].append({"id": 402, "content": "hi", **flags})
    tokenizer = Tokenizer.from_json(json.dumps(spec), config=ENDS)
    with pytest.raises(UserError, match="spells a special token"):
        tokenizer.encode([Part("text", "hi")], [], image_id=400)


# Stop strings.


@settings(deadline=None)
@example(text="xab#", stops=["ab#", "b"], cuts=[])
@example(text="aab", stops=["b", "ab"], cuts=[1])
@given(
    text=st.text("ab#", max_size=14),
    stops=st.lists(st.text("ab#", max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 14), max_size=4),
)
def test_a_stop_string_cuts_wherever_it_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    """Against one character at a time: the answer ends when the first stop string is complete."""
    expected, ends = (
        text,
        [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops if stop)],
    )
    if ends:
        seen = text[: ends[0]]
        expected = seen[: -max(len(stop) for stop in stops if stop and seen.endswith(stop))]
    stopper, bounds = StopText(stops), [0, *sorted(cuts), len(text)]
    shown, stopped = "", False
    for start, end in itertools.pairwise(bounds):
        piece, stopped = stopper.push(text[start:end])
        shown += piece
        assert expected.startswith(shown)
    assert stopped == bool(ends)
    assert shown + stopper.finish() == expected


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    stopper = StopText(["###", "\n\n"])
    assert stopper.push("Yes #") == ("Yes ", False)
    assert stopper.push("1") == ("#1", False)
    assert stopper.push("\n") == ("", False)
    assert stopper.finish() == "\n"


class Counted(str):
    """A text that counts how often somebody looks at its characters."""

    looks = 0

    def __getitem__(self, place: Any) -> str:
        found = super().__getitem__(place)
        Counted.looks += len(found)
        return found


@pytest.mark.parametrize("size", [1_000, 30_000])
def test_a_huge_stop_string_costs_its_length(size: int) -> None:
    """Where every character of a long answer may still become it: each is looked at a few times at most."""
    Counted.looks, stopper = 0, StopText([Counted("a" * size + "b")])
    shown = "".join(stopper.push("aaa")[0] for _ in range(size))
    assert shown == "a" * (2 * size)
    assert stopper.push("ab!") == ("a", True)
    assert stopper.finish() == ""
    assert Counted.looks < 6 * 3 * size
