"""A tiny embedding model with random weights, saved by sentence-transformers itself."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

LETTERS = string.ascii_lowercase
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{each}" for each in LETTERS)]


def sentence_folder(folder: Path, *, seed: int = 0, positions: int = 32) -> Path:
    """BERT of two layers, mean pooling, a dense layer, length 1: 24 numbers a text."""
    torch.manual_seed(seed)
    plain = folder.with_name(folder.name + "-bert")
    plain.mkdir(parents=True)
    (plain / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config).save_pretrained(plain)
    BertTokenizerFast(str(plain / "vocab.txt"), model_max_length=positions).save_pretrained(plain)
    transformer = Transformer(str(plain))
    modules = [transformer, Pooling(32), Dense(32, 24), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    # Published models of this age have whole numbers among their weights.
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "embeddings.position_ids": torch.arange(positions)[None]}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return folder
