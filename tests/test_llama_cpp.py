"""llama.cpp itself, where `PUMICE_LLAMA_CPP` names the folder of its programs: files go both ways, answers agree."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import gguf
import pytest
import torch

import pumice
import tiny
from pumice import Sampling, checkpoints, packing
from pumice.network.llama import Batch
from pumice.quant import QTensor
from test_gguf import pair

if "PUMICE_LLAMA_CPP" not in os.environ:
    pytest.skip("PUMICE_LLAMA_CPP names no folder of llama.cpp's programs", allow_module_level=True)
PROGRAMS = Path(os.environ["PUMICE_LLAMA_CPP"])
PROMPT = "The sign says stop and go"
TOKENS = 12


def ran(program: str, *arguments: object) -> bytes:
    command = [str(PROGRAMS / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def continued(path: Path) -> bytes:
    """The greedy words that llama.cpp puts behind the prompt, in float32. On a busy machine it now and then leaves
    before all is printed, so the longest of three counts."""
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    plain = ["-no-cnv", "--no-warmup", "--no-display-prompt", "--temp", "0", "-t", "1", "-c", "512"]
    asked = ["-m", path, "-p", PROMPT, "-n", TOKENS]
    return max((ran("llama-completion", *asked, *plain, *exact).strip() for _ in range(3)), key=len)


def said(model: pumice.model.Model, tokens: tuple[int, ...]) -> bytes:
    """The bytes of tokens, which need not be letters; control and unused tokens have none."""
    pieces = [model.tokenizer.token_of(token) for token in tokens if token not in model.config.stop_ids]
    pieces = [each.replace("▁", " ") for each in pieces if not each.startswith("[PAD")]
    byte = re.compile("<0x([0-9A-F]{2})>")
    return b"".join(bytes.fromhex(m[1]) if (m := byte.fullmatch(each)) else each.encode() for each in pieces).strip()


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("lm", ["vicuna", "mistral"])
def test_llama_cpp_says_the_same(lm: str, seed: int, tmp_path: Path) -> None:
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5", lm=lm, seed=seed), tmp_path / "gguf")
    model = pumice.load(path)
    answer = model.ask(PROMPT, raw=True, sampling=Sampling(max_tokens=TOKENS))
    assert len(answer.tokens) > 4
    assert continued(path) == said(model, answer.tokens)


def wide_model(folder: Path) -> Path:
    """A language model whose rows are whole super-blocks: the tiny one would fall back to other formats."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
    import random_models

    path, _ = random_models.files(folder, "tiny", "f16", tiled=False)
    return path


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("mix", ["Q4_0", "Q8_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL"])
def test_what_llama_quantize_writes(mix: str, tmp_path: Path) -> None:
    """It loads, in blocks; the bytes are pumice's own; the logits are those of the dequantised weights."""
    plain, path = wide_model(tmp_path / "plain"), tmp_path / f"{mix}.gguf"
    ran("llama-quantize", plain, path, mix, "1")
    found, source = checkpoints.read(path), checkpoints.read(plain)
    stored = {name: found.tensors.stored(name) for name in found.tensors.names()}
    blocks = {name: each for name, each in stored.items() if isinstance(each, QTensor)}
    assert len(blocks) == 2 * 7 + 2
    for name, each in blocks.items():
        if each.format.name != "IQ4_NL":
            expected = packing.quantised(source.tensors[name].float(), each.format)
            assert torch.equal(each.in_order().data_RB, expected.data_RB), name
    ids = torch.arange(3, 40)[None]
    assert torch.equal(logits(path, ids), logits(path, ids, dense=by_package(path)))


def by_package(path: Path) -> dict[str, torch.Tensor]:
    """The matrices that the gguf package unpacks, by their names in the file."""
    return {
        each.name: torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy())
        for each in gguf.GGUFReader(path).tensors
    }


def logits(path: Path, ids: torch.Tensor, dense: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Of the last position. `dense` replaces the weights that are read as they stand in the file, heads unturned."""
    network = pumice.load(path, dtype="float32", template="vicuna_v1").network
    if dense is not None:
        from pumice.checkpoints.gguf import name_of
        from pumice.quant import heads_turned

        text = network.config.text
        for name, weight in dense.items():
            heads = {"attn_q": text.heads, "attn_k": text.kv_heads}.get(name.split(".")[-2])
            rows = slice(None) if heads is None else heads_turned(heads * text.head_width, text.head_width)
            module, _, field = name_of(name).rpartition(".")
            delattr(network.get_submodule(module), field)
            setattr(network.get_submodule(module), field, torch.nn.Parameter(weight[rows], requires_grad=False))
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1])[None]
        return network.logits(network(network.embed(ids, []), Batch(positions)))[0, -1]
