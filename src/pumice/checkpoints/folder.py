"""What a model becomes in a folder, whichever format the folder has: its weights one by one, its tokenizer's files."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from pumice.checkpoints.form import Checkpoint, expected_tensors
from pumice.checkpoints.gguf_file import open_gguf
from pumice.checkpoints.gguf_vocab import tokenizer_files
from pumice.checkpoints.origin import Origin, json_bytes
from pumice.checkpoints.recoded import FORMAT_OF, recoded
from pumice.checkpoints.report import Progress, Written
from pumice.checkpoints.safetensors_writer import DTYPE_NAMES, Weight, put_shards
from pumice.checkpoints.sidefiles import TOKENIZER_FILES
from pumice.config import LlavaConfig

SHARD_BYTES = 5 * 2**30

WORDS = (*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json")


def words_of(checkpoint: Checkpoint, origin: Origin | None) -> dict[str, bytes]:
    """The tokenizer's files: those of the source, or made from a GGUF's metadata."""
    home = checkpoint.home or checkpoint.path
    if checkpoint.format != "gguf":
        found = {path.name: path.read_bytes() for path in home.iterdir() if path.name in WORDS and path.is_file()}
    else:
        found = {name: data for name, data in origin.files.items() if name in WORDS} if origin else {}
    if "tokenizer.json" in found or "tokenizer.model" in found:
        return found
    return {name: json_bytes(each) for name, each in tokenizer_files(open_gguf(checkpoint.path).fields).items()}


def weights_of(
    checkpoint: Checkpoint, config: LlavaConfig, dtype: torch.dtype | None, origin: Origin | None
) -> dict[str, Weight]:
    """The tensors of a config, by pumice's names: those of the checkpoint, with more rows where the config's vocabulary
    is larger, and norms without effect where it has none.

    dtype: of all; None takes those of the folder that a GGUF was made from, or its own, float16 for what is in blocks.
    """
    have = set(checkpoint.tensors.names())
    known = origin.dtypes if origin is not None and checkpoint.format == "gguf" else {}
    weights = {}
    for name, shape in expected_tensors(config).items():
        if name not in have:
            load = functools.partial(torch.ones if name.endswith("weight") else torch.zeros, shape)
            weights[name] = Weight(shape, dtype or torch.float32, load)
            continue
        own = torch.float16 if checkpoint.tensors.blocks(name) else checkpoint.tensors.dtype(name)
        chosen = dtype or known.get(name, own)
        weights[name] = Weight(shape, chosen, functools.partial(_loaded, checkpoint, name, chosen, shape[0]))
    return weights


def _loaded(checkpoint: Checkpoint, name: str, dtype: torch.dtype, rows: int) -> Tensor:
    """A tensor, with more rows where the vocabulary grew. The mean of all rows is never the best of them, so that no
    answer changes."""
    if dtype in FORMAT_OF:
        raw = recoded(name, checkpoint.tensors.stored(name), FORMAT_OF[dtype])
        values = torch.from_numpy(raw).view(dtype).view(checkpoint.tensors.shape(name))
    else:
        values = checkpoint.tensors[name]
    if len(values) == rows:
        return values
    mean = values.float().mean(dim=0, keepdim=True).to(values.dtype)
    return torch.cat((values, mean.expand(rows - len(values), -1)))


def put_weights(folder: Path, weights: dict[str, Weight], progress: Progress) -> None:
    """Shards of the weights, which are named as the files are to name them."""
    total, done = sum(each.nbytes for each in weights.values()), 0
    for key in put_shards(folder, weights, SHARD_BYTES):
        done += weights[key].nbytes
        progress(key, done, total)


def written(folder: Path, weights: dict[str, Weight]) -> Written:
    """The line of a report."""
    kinds = Counter(DTYPE_NAMES[each.dtype] for each in weights.values())
    return Written(folder, len(weights), dict(kinds.most_common()), sum(each.nbytes for each in weights.values()))
