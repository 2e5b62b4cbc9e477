"""Tiny LLaVAs with random weights, written by Transformers itself: the oracle and the checkpoint in one.

`hf_folder` makes what Transformers' save_pretrained makes, with a small tokenizer and processor files beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
)

PATCH_PX = 14
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

WORDS = """A chat between a curious user and an artificial intelligence assistant USER ASSISTANT INST What is shown in
this image the sign says stop and go red green blue circle square star three two one Describe briefly how many"""


@dataclass(frozen=True)
class LanguageModel:
    """What tells one language model from another: numbers, words, end tokens."""

    kv_heads: int
    theta: float
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    template: str
    mistral: bool = False
    bytes_in_words: bool = False

    def prompt(self, images: int, text: str) -> str:
        """One question as Transformers' chat template of this family renders it."""
        marks = "<image>\n" * images
        match self.template:
            case "vicuna":
                return f"USER: {marks}{text} ASSISTANT:"
            case "mistral":
                return f"[INST] {marks}{text} [/INST]"
            case "chatml":
                return f"<|im_start|>user\n{marks}{text}<|im_end|>\n<|im_start|>assistant\n"
            case _:
                head = "<|start_header_id|>{}<|end_header_id|>\n\n"
                return f"{head.format('user')}{'<image>' * images}\n{text}<|eot_id|>{head.format('assistant')}"


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LANGUAGE_MODELS = {
    "vicuna": LanguageModel(4, 1e4, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "vicuna"),
    "mistral": LanguageModel(2, 1e6, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "mistral", mistral=True),
    "yi": LanguageModel(
        2, 5e6, ("<unk>", "<|startoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "chatml"
    ),
    "llama3": LanguageModel(2, 5e5, LLAMA3, LLAMA3[0], "<|eot_id|>", "llama3", bytes_in_words=True),
}


def hf_folder(
    folder: Path,
    *,
    family: str = "1.6",
    lm: str = "vicuna",
    tile_px: int = 28,
    template: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint of a few hundred kilobytes; `template` is its jinja text, None leaves it out."""
    kind = LANGUAGE_MODELS[lm]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(kind)
    vocab = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = oracle(family, kind, vocab, tile_px, image_id=tokenizer.token_to_id("<image>"), seed=seed)
    model.generation_config.eos_token_id = tokenizer.token_to_id(kind.eos)
    model.generation_config.pad_token_id = tokenizer.token_to_id("<pad>")
    model.save_pretrained(folder)
    names = {"bos_token": kind.bos, "eos_token": kind.eos, "pad_token": "<pad>", "padding_side": "left"}
    _write(
        folder / "tokenizer_config.json",
        {k: v for k, v in names.items() if v} | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    _write(folder / "preprocessor_config.json", _preprocessor(family, tile_px))
    processor = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH_PX}
    name = "LlavaNextProcessor" if family == "1.6" else "LlavaProcessor"
    _write(
        folder / "processor_config.json",
        processor | {"processor_class": name, "vision_feature_select_strategy": "default"},
    )
    if template is not None:
        _write(folder / "chat_template.json", {"chat_template": template})
    return folder


def oracle(family: str, kind: LanguageModel, vocab: int, tile_px: int, *, image_id: int, seed: int) -> PreTrainedModel:
    """The Transformers model itself, float32, with weights large enough that the best token leads clearly."""
    torch.manual_seed(seed)
    text = (MistralConfig if kind.mistral else LlamaConfig)(
        vocab_size=-(-vocab // 64) * 64, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=kind.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": kind.theta},
        max_position_embeddings=8192, rms_norm_eps=1e-5, **({"sliding_window": None} if kind.mistral else {}),
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=tile_px,
        patch_size=PATCH_PX,
    )
    if family == "1.6":
        config = LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=image_id, image_grid_pinpoints=pinpoints(tile_px)
        )
        model: PreTrainedModel = LlavaNextForConditionalGeneration(config)
    else:
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
        )
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or "class_embedding" in name or "newline" in name:
            torch.nn.init.normal_(weight, std=0.6 / weight.shape[-1] ** 0.5 if "embed" not in name else 0.6)
    return model.eval()


def pinpoints(tile_px: int) -> list[list[int]]:
    """LLaVA 1.6's canvases for another tile size, in the published order."""
    return [[tile_px * a, tile_px * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _preprocessor(family: str, tile_px: int) -> dict[str, object]:
    common: dict[str, object] = {
        "crop_size": {"height": tile_px, "width": tile_px}, "size": {"shortest_edge": tile_px}, "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
        "image_std": STD, "resample": 3, "rescale_factor": 1 / 255,
    }  # fmt: skip
    if family == "1.6":
        return common | {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints(tile_px),
            "do_pad": True,
        }  # fmt: skip
    return common | {"image_processor_type": "CLIPImageProcessor"}


def _tokenizer(kind: LanguageModel) -> Tokenizer:
    """A byte-level BPE (Llama 3) or a Llama-like BPE with byte fallback, trained on a few words."""
    specials = [*kind.specials, "<image>", "<pad>"]
    if kind.bytes_in_words:
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner.train_from_iterator(
            [WORDS],
            trainers.BpeTrainer(
                vocab_size=340, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
            ),
        )
        learner.decoder = decoders.ByteLevel()
        return _with_bos(learner, kind)
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(WORDS.split(), trainers.BpeTrainer(vocab_size=140, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    bpe = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    made = Tokenizer(bpe)
    made.normalizer = learner.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(specials)
    return _with_bos(made, kind)


def _with_bos(tokenizer: Tokenizer, kind: LanguageModel) -> Tokenizer:
    if kind.bos is not None:
        ids = [(kind.bos, tokenizer.token_to_id(kind.bos))]
        tokenizer.post_processor = TemplateProcessing(single=f"{kind.bos} $A", special_tokens=ids)
    return tokenizer


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
