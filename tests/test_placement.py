"""A network of which a part lies on another device: which part, by whose count, and that it computes the same.

Without a second device both parts lie on the CPU, or one where there are no numbers (`meta`).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import pumice
import tiny
from pumice import Model, Sampling, UserError, ops
from pumice.model import assembled, load_from
from pumice.network.llama import Batch
from pumice.network.placement import CPU, Placement
from pumice.ops import Pages
from pumice.ops.pages import LayerPages
from pumice.quant import QTensor
from pumice.source import Source

META = torch.device("meta")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LLaVA of three blocks in plain numbers and in blocks."""
    root = tmp_path_factory.mktemp("placement")
    found = {"plain": tiny.hf_folder(root / "hf", family="1.6", lm="mistral"), "blocks": root / "q8.gguf"}
    pumice.convert(found["plain"], found["blocks"], quant="Q8_0")
    return found


# llama.cpp b11434, llama-model.cpp, load_tensors: the first block on the GPU is max(n_layer + 1 - n_gpu_layers, 0), and
# the head is the layer behind the last block.
@pytest.mark.parametrize(
    ("gpu_layers", "blocks", "head", "embeddings"),
    [
        (None, {0, 1, 2}, True, True),
        (0, set(), False, False),
        (1, set(), True, False),
        (2, {2}, True, False),
        (3, {1, 2}, True, False),
        (4, {0, 1, 2}, True, True),
        (99, {0, 1, 2}, True, True),
    ],
)
def test_layers_are_counted_as_llama_cpp_does(
    gpu_layers: int | None, blocks: set[int], head: bool, embeddings: bool
) -> None:
    place = Placement.of_layers(CUDA, 3, gpu_layers)
    assert {each for each in range(3) if place.of(f"language_model.layers.{each}.mlp.up_proj.weight") == CUDA} == blocks
    for name in ("lm_head.weight", "language_model.norm.weight", "vision_tower.pre_layrnorm.weight", "image_newline"):
        assert (place.of(name) == CUDA) is head
    assert (place.of("vision_tower.encoder.layers.0.mlp.fc1.weight") == CUDA) is head
    assert (place.of("language_model.embed_tokens.weight") == CUDA) is embeddings


@pytest.mark.parametrize("wrong", [-1, True, 2.5, "3"])
def test_no_such_number_of_layers(files: dict[str, Path], wrong: object) -> None:
    with pytest.raises(UserError, match="gpu_layers is"):
        pumice.load(files["plain"], device="cpu", gpu_layers=wrong)  # type: ignore[arg-type]


def test_layers_for_a_gpu_that_is_not_there(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="2 layers are to lie on a GPU, and the device is the CPU"):
        pumice.load(files["plain"], device="cpu", gpu_layers=2)
    assert pumice.load(files["plain"], device="cpu", gpu_layers=0).network.like.device == CPU


@pytest.mark.parametrize("kind", ["plain", "blocks"])
@pytest.mark.parametrize("gpu_layers", [1, 2, 3])
def test_each_tensor_lies_where_it_should(files: dict[str, Path], kind: str, gpu_layers: int) -> None:
    checkpoint = Source(files[kind]).checkpoint()
    place = Placement.of_layers(META, 3, gpu_layers)
    network = assembled(checkpoint.tensors, checkpoint.config, None, place)
    lies = {name: each.device for name, each in network.named_parameters()}
    for path, module in network.named_modules():
        weight = module.__dict__.get("weight")
        if isinstance(weight, QTensor):
            lies[f"{path}.weight"] = weight.device
    assert lies == {name: place.of(name) for name in checkpoint.tensors.names() if name in lies}
    assert len(lies) == len(network.state_dict()) + sum(name not in network.state_dict() for name in lies)
    assert network.language_model.devices == [META if layer > 3 - gpu_layers else CPU for layer in range(3)]
    assert network.like.device == CPU


# --- the same numbers -------------------------------------------------------------------------------------------------


def kept(model: Model) -> tuple[list[Tensor], list[Tensor]]:
    text = model.config.text
    shape = (8, text.kv_heads, 4, text.head_width)
    keys, values = ([torch.zeros(shape) for _ in range(text.layers)] for _ in range(2))
    return keys, values


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["plain", "blocks"])
@pytest.mark.parametrize("border", [1, 2, 3])
def test_two_parts_are_the_whole(files: dict[str, Path], kind: str, border: int) -> None:
    """With pages and without; all positions, and the last few; in parts of which each is one call where it can be."""
    whole, parted = (load_from(Source(files[kind]), device="cpu") for _ in range(2))
    parted.network.language_model.border = border
    width, tokens = whole.config.text.width, 7
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(parted.network(x), whole.network(x))
    for count in (None, 2):
        results, caches = [], []
        for model in (whole, parted):
            pages = Pages(*kept(model), torch.arange(3)[None])
            batch = Batch(torch.arange(tokens)[None], pages=pages, kept=count, reach_B=torch.tensor([tokens - 1]))
            results.append(model.network(x, batch))
            caches.append(torch.stack([*pages.keys, *pages.values]))
        assert results[0].shape == (1, count or tokens, width)
        assert torch.equal(*results)
        assert torch.equal(*caches)
    if kind == "blocks":
        assert len(parted.network.language_model._at_once) == (1 if border == 3 else 2)


@pytest.mark.parametrize("kind", ["plain", "blocks"])
def test_answers_of_two_parts(files: dict[str, Path], kind: str) -> None:
    whole, parted = (load_from(Source(files[kind]), device="cpu") for _ in range(2))
    parted.network.language_model.border = 2
    picture = Image.effect_noise((60, 45), 90).convert("RGB")
    answers = [each.ask("What is shown?", picture, sampling=Sampling(max_tokens=8)) for each in (whole, parted)]
    assert answers[0].tokens == answers[1].tokens


@torch.inference_mode()
@pytest.mark.parametrize("gpu_layers", [1, 2, 3, 4])
def test_nothing_stays_behind_at_the_border(
    files: dict[str, Path], gpu_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's side is on `meta`, where PyTorch refuses to add and multiply with what lies elsewhere."""

    def attended(q: Tensor, pages: LayerPages, positions: Tensor, window: int | None) -> Tensor:
        assert {each.device for each in (q, pages.keys, pages.values, pages.table_RP, positions)} == {META}
        return torch.empty_like(q)

    monkeypatch.setattr(
        ops, "_by_triton", lambda x: SimpleNamespace(attention_in_pages=attended) if x.is_meta else None
    )
    checkpoint = Source(files["plain"]).checkpoint()
    network = assembled(checkpoint.tensors, checkpoint.config, None, Placement.of_layers(META, 3, gpu_layers))
    text, start = checkpoint.config.text, network.like.device
    shape = (8, text.kv_heads, 4, text.head_width)
    keys, values = ([torch.zeros(shape, device=each) for each in network.language_model.devices] for _ in range(2))
    positions = torch.tensor([[2], [6]], device=start)
    pages = Pages(keys, values, torch.arange(4, device=start).view(2, 2))
    x = network.language_model.embed_tokens(torch.ones(2, 1, dtype=torch.int64, device=start))
    hidden = network(x, Batch(positions, pages=pages, reach_B=positions[:, 0]))
    assert network.logits(hidden).device == META
    assert network(x).device == META
    features = torch.zeros(1, text.width, dtype=torch.float64)
    if start == CPU:
        image = torch.tensor([[checkpoint.config.image_token_id, 1]])
        assert network.embed(image, [features]).dtype == network.like.dtype


def test_what_is_moved_with_a_batch() -> None:
    pages = Pages([torch.zeros(1)], [torch.zeros(1)], torch.arange(3)[None])
    batch = Batch(torch.arange(4)[None], torch.ones(1, 4, 4, dtype=torch.bool), False, pages, 2, torch.tensor([3]))
    assert batch.on(CPU) is batch
    moved = batch.on(META)
    assert moved.pages is not None
    there = (moved.positions_BT, moved.mask_BTS, moved.reach_B, moved.pages.table_RP)
    assert {each.device for each in there if each is not None} == {META}
    assert moved.pages.keys[0].device == CPU
    assert (moved.causal, moved.kept) == (False, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("gpu_layers", [1, 2, 3, 4])
def test_a_split_on_a_gpu(files: dict[str, Path], gpu_layers: int) -> None:
    picture = Image.effect_noise((60, 45), 90).convert("RGB")
    on_cpu, split = (
        load_from(Source(files["plain"]), device="cpu"),
        load_from(Source(files["plain"]), gpu_layers=gpu_layers),
    )
    asked = [each.ask("What is shown?", picture, sampling=Sampling(max_tokens=8)) for each in (on_cpu, split)]
    assert asked[0].tokens == asked[1].tokens
    assert_close(split.network.language_model.norm.weight.cpu(), on_cpu.network.language_model.norm.weight)
