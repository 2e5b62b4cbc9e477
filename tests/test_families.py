"""Language models beyond the plain Llama: scaled rotary embeddings, sliding windows, Phi-3; from Hugging Face folders
and from GGUF. The oracle is Transformers' own class, the GGUF files are written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
)

import pumice
import tiny
from pumice import Sampling, checkpoints
from pumice.network import llava

SIZES: dict[str, Any] = {
    "vocab_size": 448, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + 2.0 * i for i in range(8)]
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
LONG_ROPE = {"short_factor": SHORT, "long_factor": LONG}
CONFIGS = {
    "linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama3": LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 50.0, **LLAMA_3}),
    "longrope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e3, "attention_factor": 1.3,
            "original_max_position_embeddings": 24, **LONG_ROPE,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "phi3": Phi3Config(**SIZES),
    "phi3-window": Phi3Config(**SIZES, sliding_window=6),
    "phi3-long": Phi3Config(
        **SIZES, original_max_position_embeddings=24, rope_parameters={"rope_type": "longrope", **LONG_ROPE}
    ),
    "phi3-long-window": Phi3Config(
        **SIZES, original_max_position_embeddings=24, sliding_window=9,
        rope_parameters={"rope_type": "longrope", **LONG_ROPE},
    ),
}  # fmt: skip
PROMPT = [1, *range(300, 310)]


def oracle(config: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if config.model_type == "llava" else AutoModelForCausalLM
    model = kind.from_config(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or "class_embedding" in name:
            torch.nn.init.normal_(weight, std=0.9 / weight.shape[-1] ** 0.5 if "embed" not in name else 0.9)
    return model.float().eval()


def folder_of(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny._tokenizer(tiny.LANGUAGE_MODELS["vicuna"]).save(str(folder / "tokenizer.json"))
    return folder


def greedy(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """Token by token, the whole row each time: no cache that could hold keys of the other factors."""
    row = list(ids)
    for _ in range(tokens):
        with torch.inference_mode():
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == 2:
            break
    return row[len(ids) :]


def agree(model: pumice.Model, theirs: PreTrainedModel, tolerance: float = 2e-5) -> None:
    """Logits of short and long rows, the plain loop, the engine alone and in a batch of unequal rows."""
    network = model.network
    for length in (5, 23, 24, 25, 60):
        ids = torch.randint(3, 440, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            ours, expected = network.logits(network(network.embed(ids, []))), theirs(ids).logits
        assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max()), length
    prompts = [PROMPT, PROMPT[:3], [1, *range(310, 333)], [1, *range(350, 380)]]
    expected = [greedy(theirs, ids, 40) for ids in prompts]
    assert max(map(len, expected)) == 40
    sampling = Sampling(max_tokens=40)
    assert [model.generate(ids, sampling=sampling) for ids in prompts] == expected
    assert list(llava.generate(network, PROMPT, [], 30)) == expected[0][:30]
    run = pumice.engine.Run(network, [pumice.engine.Request(ids, [], sampling) for ids in prompts])
    together: list[list[int]] = [[] for _ in prompts]
    while steps := run.step():
        for step in steps:
            together[step.row].append(step.token)
    assert together == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_folders_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    theirs = oracle(CONFIGS[name])
    agree(pumice.load(folder_of(theirs, tmp_path / "m")), theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_written_folders_compute_the_same(name: str, tmp_path: Path) -> None:
    """Divided frequencies are written as Transformers' longrope, Phi-3's matrices apart, a window as Mistral's."""
    theirs = oracle(CONFIGS[name])
    source = folder_of(theirs, tmp_path / "m")
    first = checkpoints.read(source)
    checkpoints.write_hf(tmp_path / "out", first.config, first.tensors, tokenizer_files=source)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for length in (20, 60):
        ids = torch.randint(3, 440, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    agree(pumice.load(tmp_path / "out"), theirs)
