"""Checkpoint folders: values against Transformers, PEFT and the reference results; what is refused, in which words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

import tiny
from conftest import reference
from pumice import checkpoints, store
from pumice.checkpoints.fields import Fields
from pumice.checkpoints.settings import text_config, vision_config
from pumice.config import Rotary
from pumice.errors import UserError
from pumice.network.llava import Llava

HF = [
    "mistral15-42",
    "mistral16-28",
    "vicuna15-28",
    "vicuna15-56",
    "vicuna15-full",
    "vicuna16-28",
    "vicuna16-56",
    "yi16-28",
]
TWINS = {
    "llava-v1.5-tiny": "vicuna15-28",
    "llava-v1.6-vicuna-tiny": "vicuna16-28",
    "llava-v1.6-mistral-tiny": "mistral16-28",
}
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A 1.5 and a 1.6 folder as Transformers writes them."""
    root = tmp_path_factory.mktemp("made")
    return {family: tiny.hf_folder(root / family, family=family, template=VICUNA) for family in ("1.5", "1.6")}


@pytest.fixture
def hf(made: dict[str, Path], tmp_path: Path) -> Path:
    """A 1.5 folder to spoil."""
    return Path(shutil.copytree(made["1.5"], tmp_path / "model"))


@pytest.fixture
def hf16(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["1.6"], tmp_path / "model16"))


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; a key with `__` goes one object deeper; ... removes."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = content
        for name in outer:
            place = place[name]
        if value is ...:
            place.pop(last, None)
        else:
            place[last] = value
    file.write_text(json.dumps(content))


def resave(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder: Path, *words: str, **named: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        checkpoints.read(folder, **named)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 900 + 2 * len(str(folder))
    return caught.value


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def in_memory(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Transformers 5's own names, which are pumice's with `model.` in front."""
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def transformers_model(folder: Path) -> PreTrainedModel:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    classes = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
    model, info = classes.get(kind, AutoModelForCausalLM).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HF)
def test_golden_folders_hold_what_transformers_loads(name: str) -> None:
    folder = reference("golden/models") / name
    checkpoint, model = checkpoints.read(folder), transformers_model(folder)
    same(checkpoint.tensors, in_memory(model))
    theirs, ours = model.config, checkpoint.config
    text, vision = theirs.text_config, theirs.vision_config
    assert ours.text.rotary.theta == text.rope_parameters["rope_theta"]
    assert (ours.text.heads, ours.text.kv_heads, ours.text.norm_eps) == (
        text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps,
    )  # fmt: skip
    assert ours.vision is not None
    assert (ours.vision.heads, ours.vision.activation) == (vision.num_attention_heads, vision.hidden_act)
    assert (ours.vision.image_px, ours.vision.patch_px) == (vision.image_size, vision.patch_size)
    assert ours.vision.feature_layers == (theirs.vision_feature_layer,)
    assert ours.vision.keep_class_token == (theirs.vision_feature_select_strategy == "full")
    assert ours.image_token_id == theirs.image_token_id
    stops = model.generation_config.eos_token_id
    assert ours.stop_ids == (tuple(stops) if isinstance(stops, list) else (stops,))


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_golden_authors_folders_hold_the_same_model(name: str, twin: str) -> None:
    theirs = checkpoints.read(reference("golden/models-original") / name)
    ours = checkpoints.read(reference("golden/models") / twin)
    assert theirs.format == "original"
    same(theirs.tensors, dict(ours.tensors))
    assert theirs.config.text == ours.config.text
    assert theirs.config.vision == ours.config.vision
    assert theirs.config.image is not None
    assert ours.config.image is not None
    assert theirs.config.image == ours.config.image.under("original")
    assert theirs.config.image_token_id == -200
    assert theirs.config.template == {"vicuna15-28": "vicuna_v1", "vicuna16-28": "vicuna_v1"}.get(
        twin, "mistral_instruct"
    )


def test_the_tower_inside_a_checkpoint_wins() -> None:
    folder = reference("golden/models-original")
    checkpoint = checkpoints.read(folder / "llava-v1.6-vicuna-tiny", beside=[folder / "llava-v1.6-vicuna-tiny-clip"])
    beside = load_file(folder / "llava-v1.6-vicuna-tiny-clip" / "model.safetensors")
    assert not torch.equal(
        checkpoint.tensors["vision_tower.pre_layrnorm.weight"], beside["vision_model.pre_layrnorm.weight"]
    ) or not torch.equal(
        checkpoint.tensors["vision_tower.embeddings.class_embedding"], beside["vision_model.embeddings.class_embedding"]
    )


def test_lora_equals_peft_and_the_golden_logits() -> None:
    from peft import PeftModel

    root = reference("golden/models-original")
    checkpoint = checkpoints.read(root / "llava-v1.5-tiny-lora")
    base = AutoModelForCausalLM.from_pretrained(root / "vicuna-tiny")
    before = base.state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    merged = in_memory(PeftModel.from_pretrained(base, root / "llava-v1.5-tiny-lora").merge_and_unload())
    merged = {name if name.startswith("lm_head") else f"language_model.{name}": each for name, each in merged.items()}
    assert not torch.equal(merged["language_model.layers.1.mlp.up_proj.weight"], before)
    for name, tensor in merged.items():
        torch.testing.assert_close(checkpoint.tensors[name], tensor, rtol=1e-6, atol=1e-7)
    extra = torch.load(root / "llava-v1.5-tiny-lora" / "non_lora_trainables.bin", weights_only=True)
    key = "base_model.model.model.mm_projector.2.weight"
    assert torch.equal(checkpoint.tensors["multi_modal_projector.linear_2.weight"], extra[key])

    golden = json.loads(reference("golden/generate.json").read_text())["original_layout"]["llava-v1.5-tiny-lora"]
    (sample,) = [each for each in golden["samples"] if not each["images"]]
    network = Llava(checkpoint.config)
    network.load_state_dict(dict(checkpoint.tensors))
    with torch.inference_mode():
        hidden = network(network.embed(torch.tensor([sample["input_ids"]]), []))
        logits = network.logits(hidden[0, -1])
    torch.testing.assert_close(logits, torch.tensor(sample["logits"]), rtol=0, atol=1e-3)


def test_lora_by_hand(tmp_path: Path) -> None:
    """rank 2, alpha 3, in float16: (W + 1.5 · B A) rounded once."""
    from pumice.checkpoints import lora
    from pumice.checkpoints.tensors import Entry

    torch.manual_seed(0)
    weight, down, up = torch.randn(4, 3).half(), torch.randn(2, 3).half(), torch.randn(4, 2).half()
    stem = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file({f"{stem}A.weight": down, f"{stem}B.weight": up}, tmp_path / "adapter_model.safetensors")
    name = "language_model.layers.0.mlp.up_proj.weight"
    base = {name: Entry("w", (4, 3), torch.float16, lambda: weight)}
    for values, scale in (({}, 1.5), ({"use_rslora": True}, 3 / 2**0.5)):
        config = Fields({"r": 2, "lora_alpha": 3, **values}, "adapter_config.json")
        expected = [
            [float(weight[i, j]) + scale * sum(float(up[i, k]) * float(down[k, j]) for k in range(2)) for j in range(3)]
            for i in range(4)
        ]
        found = lora.merged(base, tmp_path, config)[name].load()
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).half(), rtol=1e-3, atol=1e-4)


def test_projector_alone_over_a_base(tmp_path: Path) -> None:
    root = reference("golden/models-original")
    folder = tmp_path / "stage1"
    folder.mkdir()
    for name in ("config.json", "mm_projector.bin"):
        shutil.copyfile(root / "llava-v1.5-tiny" / name, folder / name)
    tower, base = root / "llava-v1.5-tiny-clip", root / "vicuna-tiny"
    assert (base, tower) == (root / "vicuna-tiny", root / "llava-v1.5-tiny-clip")
    checkpoint = checkpoints.read(folder, beside=[tower, base])
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert torch.equal(
        checkpoint.tensors["multi_modal_projector.linear_1.bias"], projector["model.mm_projector.0.bias"]
    )
    text = load_file(root / "vicuna-tiny" / "model.safetensors")
    assert torch.equal(checkpoint.tensors["language_model.norm.weight"], text["model.norm.weight"])
    refused(folder, "language model under it", "--with", beside=[tower])
    refused(folder, "llava-v1.5-tiny-clip", "--with", beside=[base])


def authors_folder(made: dict[str, Path], root: Path, *, tower: bool) -> Path:
    """The tiny 1.6 model in the authors' key names (spec of the converter, written out by hand)."""
    source = checkpoints.read(made["1.6"])
    folder = Path(shutil.copytree(made["1.6"], root / "authors"))
    for name in ("chat_template.json", "preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    tensors = {}
    for name, tensor in source.tensors.items():
        if name.startswith("vision_tower."):
            name = f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_tower.')}"
            if not tower:
                continue
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("language_model.", "model.").replace("image_newline", "model.image_newline")
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    config = text | {
        "model_type": "llava_llama", "mm_vision_tower": "openai/clip-tiny", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_authors_tower_is_measured_without_a_clip_folder(made: dict[str, Path], tmp_path: Path) -> None:
    """Heads are 64 channels wide in every published tower; this one has 32 channels, hence one head."""
    folder = authors_folder(made, tmp_path, tower=True)
    checkpoint, source = checkpoints.read(folder), checkpoints.read(made["1.6"])
    same(checkpoint.tensors, dict(source.tensors))
    assert source.config.vision is not None
    assert checkpoint.config.vision == dataclasses.replace(source.config.vision, heads=1)
    assert checkpoint.config.image is not None
    assert checkpoint.config.image.pinpoints == ((56, 28), (28, 56), (56, 56), (28, 84), (84, 28))
    assert checkpoint.config.image.rules == "original"


def test_authors_tower_as_a_whole_clip_model(made: dict[str, Path], tmp_path: Path) -> None:
    """OpenAI's folder has both halves, and `model_type` clip."""
    folder = authors_folder(made, tmp_path, tower=False)
    source = checkpoints.read(made["1.6"])
    refused(folder, "openai/clip-tiny", "--with")
    clip = tmp_path / "clip-tiny"
    clip.mkdir()
    stem = "vision_tower."
    tensors = {
        f"vision_model.{k.removeprefix(stem)}": v.contiguous() for k, v in source.tensors.items() if k.startswith(stem)
    }
    tensors |= {"text_model.embeddings.token_embedding.weight": torch.ones(3, 2), "logit_scale": torch.ones(())}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(tensors, clip / "pytorch_model.bin")
    vision = json.loads((made["1.6"] / "config.json").read_text())["vision_config"]
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    checkpoint = checkpoints.read(folder)
    same(checkpoint.tensors, dict(source.tensors))
    assert checkpoint.config.vision == source.config.vision


@pytest.mark.parametrize("layout", ["hub", "v4.52", "v5"])
def test_layouts(layout: str, hf16: Path) -> None:
    """Key names written out by hand, from the table of the three layouts."""
    before = {name: tensor.clone() for name, tensor in checkpoints.read(hf16).tensors.items()}

    def key(name: str) -> str:
        part, _, rest = name.partition(".")
        hub = {
            "vision_tower": f"vision_tower.vision_model.{rest}", "language_model": f"language_model.model.{rest}",
            "lm_head": f"language_model.lm_head.{rest}", "multi_modal_projector": name, "image_newline": name,
        }[part]  # fmt: skip
        if layout == "hub":
            return hub
        if part == "lm_head":
            return name
        if part == "vision_tower" and layout == "v4.52":
            return f"model.{hub}"
        return f"model.{name}"

    extra = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file({key(name): tensor for name, tensor in before.items()} | extra, hf16 / "model.safetensors")
    same(checkpoints.read(hf16).tensors, before)


def test_a_language_model_alone(tmp_path: Path) -> None:
    """Mistral- and Qwen-shaped too; biases and tied embeddings as their classes have them."""
    for config in (
        LlamaConfig(vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        MistralConfig(
            vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=None,
        ),
        Qwen2Config(
            vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    ):  # fmt: skip
        folder = tmp_path / config.model_type
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        tiny._tokenizer(tiny.LANGUAGE_MODELS["vicuna"]).save(str(folder / "tokenizer.json"))
        checkpoint = checkpoints.read(folder)
        ours = checkpoint.config
        assert (ours.family, ours.vision, ours.image) == ("text", None, None)
        assert ours.text.tied_embeddings == ours.text.qkv_bias == (config.model_type == "qwen2")
        names = {"llama": "vicuna_v1", "mistral": "mistral_instruct", "qwen2": "qwen_1_5"}
        assert ours.template == names[config.model_type]
        theirs = model.state_dict()
        for name, tensor in checkpoint.tensors.items():
            key = name if name.startswith("lm_head") else name.replace("language_model.", "model.")
            assert torch.equal(tensor, theirs[key])
        assert set(checkpoint.tensors) == set(checkpoints.expected_tensors(ours))
        network = Llava(ours)
        network.load_state_dict(dict(checkpoint.tensors))
        ids = torch.tensor([[1, 300, 7, 42]])
        with torch.inference_mode():
            found = network.logits(network(network.embed(ids, [])))
            torch.testing.assert_close(found, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_expected_tensors_are_the_modules(made: dict[str, Path]) -> None:
    for folder in made.values():
        config = checkpoints.read(folder).config
        with torch.device("meta"):
            state = Llava(config).state_dict()
        assert checkpoints.expected_tensors(config) == {name: tuple(each.shape) for name, each in state.items()}


def test_values_are_mapped_not_copied(made: dict[str, Path], tmp_path: Path) -> None:
    from pumice.checkpoints.tensors import open_file

    checkpoint = checkpoints.read(made["1.5"])
    name = "language_model.embed_tokens.weight"
    assert checkpoint.tensors[name].data_ptr() == checkpoint.tensors[name].data_ptr()
    assert checkpoint.tensors.nbytes == sum(each.nbytes for each in checkpoint.tensors.values())
    torch.save({"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / "x.bin")
    entries = open_file(tmp_path / "x.bin")
    assert entries["a"].load().data_ptr() == entries["a"].load().data_ptr()
    assert torch.equal(entries["a"].load(), torch.arange(6.0).view(2, 3).t())


# --- defaults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "oracle", [LlamaConfig(), MistralConfig(), Qwen2Config(), Phi3Config()], ids=lambda each: each.model_type
)
def test_missing_text_keys_are_transformers_defaults(oracle: Any) -> None:
    found = text_config(Fields({}, "config.json"), oracle.model_type, tied=False)
    assert found.vocab == oracle.vocab_size
    assert (found.width, found.layers, found.ffn_width) == (
        oracle.hidden_size, oracle.num_hidden_layers, oracle.intermediate_size,
    )  # fmt: skip
    assert (found.heads, found.kv_heads) == (oracle.num_attention_heads, oracle.num_key_value_heads)
    assert found.head_width == oracle.hidden_size // oracle.num_attention_heads
    assert (found.rotary.theta, found.norm_eps) == (oracle.rope_parameters["rope_theta"], oracle.rms_norm_eps)
    assert found.max_positions == oracle.max_position_embeddings
    assert found.window == (oracle.sliding_window if oracle.model_type in ("mistral", "phi3") else None)


def test_missing_vision_keys_are_transformers_defaults() -> None:
    oracle = CLIPVisionConfig()
    found = vision_config(Fields({}, "config.json"), (-2,), keep_class_token=False)
    assert (found.width, found.layers, found.heads, found.ffn_width) == (
        oracle.hidden_size, oracle.num_hidden_layers, oracle.num_attention_heads, oracle.intermediate_size,
    )  # fmt: skip
    assert (found.image_px, found.patch_px) == (oracle.image_size, oracle.patch_size)
    assert (found.activation, found.norm_eps) == (oracle.hidden_act, oracle.layer_norm_eps)


def test_hub_config_of_llava_15_7b() -> None:
    """What the published file says, and Transformers' class for the rest: a Llama of 7B."""
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
    found = text_config(Fields(text, "config.json"), "llama", tied=False)
    assert (found.vocab, found.width, found.ffn_width, found.layers, found.heads, found.kv_heads, found.head_width) == (
        32064, 4096, 11008, 32, 32, 32, 128,
    )  # fmt: skip


def test_sliding_windows() -> None:
    """Null is none; a class without windows ignores the key."""

    def window(kind: str, value: int | None) -> int | None:
        return text_config(Fields({"sliding_window": value}, "c"), kind, tied=False).window

    assert [window("mistral", 77), window("mistral", None), window("phi3", 2047)] == [77, None, 2047]
    assert [window("llama", 77), window("qwen2", 77)] == [None, None]
    with pytest.raises(UserError, match="sliding_window is 0"):
        window("mistral", 0)


# --- side files -------------------------------------------------------------------------------------------------------


def test_stop_ids_come_from_the_nearest_file(hf: Path) -> None:
    edit(hf / "generation_config.json", eos_token_id=[5, 7])
    assert checkpoints.read(hf).config.stop_ids == (5, 7)
    edit(hf / "generation_config.json", eos_token_id=...)
    edit(hf / "config.json", text_config__eos_token_id=9)
    assert checkpoints.read(hf).config.stop_ids == (9,)
    edit(hf / "config.json", text_config__eos_token_id=...)
    assert checkpoints.read(hf).config.stop_ids == (checkpoints.read(hf).tokenizer.eos_id,)
    edit(hf / "generation_config.json", eos_token_id=10**9)
    refused(hf, "eos_token_id", "1000000000")


def test_templates(hf: Path) -> None:
    assert checkpoints.read(hf).config.template == "hf_vicuna"
    assert checkpoints.read(hf, template="llava_v1").config.template == "llava_v1"
    refused(hf, "vicuna_v2", "did you mean", template="vicuna_v2")
    (hf / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    refused(hf, "chat template", "vicuna_v1", "template=")
    (hf / "chat_template.jinja").unlink()
    (hf / "chat_template.json").unlink()
    assert checkpoints.read(hf).config.template == "vicuna_v1"
    edit(
        hf / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": VICUNA}],
    )
    assert checkpoints.read(hf).config.template == "hf_vicuna"


@pytest.mark.parametrize(
    ("lm", "template"), [("mistral", "mistral_instruct"), ("yi", "chatml_direct"), ("llama3", "llava_llama_3")]
)
def test_template_of_a_folder_that_names_none(lm: str, template: str, tmp_path: Path) -> None:
    assert checkpoints.read(tiny.hf_folder(tmp_path / "x", family="1.5", lm=lm)).config.template == template


def test_image_processor_in_either_file(hf: Path) -> None:
    fields = json.loads((hf / "preprocessor_config.json").read_text())
    first = checkpoints.read(hf).config
    (hf / "preprocessor_config.json").unlink()
    refused(hf, "preprocessor_config.json")
    edit(hf / "processor_config.json", image_processor=fields | {"image_processor_type": "CLIPImageProcessorFast"})
    assert checkpoints.read(hf).config == first
    edit(hf / "processor_config.json", image_processor__image_processor_type="LlavaImageProcessor")
    assert checkpoints.read(hf).config == first
    edit(hf / "processor_config.json", image_processor__do_pad=True, image_processor__size={"height": 28, "width": 28})
    image = checkpoints.read(hf).config.image
    assert image is not None
    assert (image.mode, image.resize_px) == ("pad", (28, 28))
    assert image.under("hf") == image, "Transformers pads for this folder, so its own rules change nothing"
    assert (image.under("original").mode, image.under("original").under("hf").mode) == ("pad", "crop")


# --- missing, extra, wrong --------------------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_named(hf: Path) -> None:
    file, key = hf / "model.safetensors", "language_model.model.layers.1.mlp.up_proj.weight"
    good = file.read_bytes()
    resave(file, lambda tensors: tensors.pop(key))
    refused(hf, "lacks", "language_model.layers.1.mlp.up_proj.weight")
    file.write_bytes(good)
    resave(file, lambda tensors: tensors.update({"model.surprise": torch.ones(2)}))
    refused(hf, "also holds", "model.surprise")
    file.write_bytes(good)
    resave(file, lambda tensors: tensors.update({key: torch.ones(3, 5)}))
    refused(hf, "language_model.layers.1.mlp.up_proj.weight", "[3, 5]", "[112, 64]")
    file.write_bytes(good)
    resave(file, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    refused(hf, "language_model.layers.1.mlp.up_proj.weight", "int8")
    file.write_bytes(good)
    resave(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
    refused(hf, "lacks", "more")
    file.unlink()
    refused(hf, "holds no weights")


def test_one_tensor_under_two_names(hf: Path) -> None:
    resave(hf / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": torch.ones(2)}))
    refused(hf, "lm_head.weight")


def test_a_tied_head_may_be_stored_or_not(hf: Path) -> None:
    edit(hf / "config.json", tie_word_embeddings=True)
    checkpoint = checkpoints.read(hf)
    assert checkpoint.config.text.tied_embeddings
    assert "lm_head.weight" not in checkpoint.tensors
    resave(hf / "model.safetensors", lambda tensors: tensors.pop("language_model.lm_head.weight"))
    assert checkpoints.read(hf).config == checkpoint.config
    edit(hf / "config.json", tie_word_embeddings=False)
    refused(hf, "lacks", "lm_head.weight")


def test_shards(hf: Path) -> None:
    before = {name: tensor.clone() for name, tensor in checkpoints.read(hf).tensors.items()}
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names, index = sorted(tensors), hf / "model.safetensors.index.json"
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for number in (0, 1):
        save_file({name: tensors[name] for name in names[number::2]}, hf / f"part-{number}.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same(checkpoints.read(hf).tensors, before)

    # A Hub cache is a folder of links.
    (hf / "part-1.safetensors").rename(hf.parent / "blob")
    (hf / "part-1.safetensors").symlink_to(hf.parent / "blob")
    same(checkpoints.read(hf).tensors, before)
    (hf / "part-1.safetensors").unlink()
    refused(hf, "part-1.safetensors", "missing")
    save_file({name: tensors[name] for name in names[3::2]}, hf / "part-1.safetensors")
    refused(hf, "index.json", names[1])
    save_file({name: tensors[name] for name in names[:5]}, hf / "part-1.safetensors")
    refused(hf, "two shards hold")


@pytest.mark.parametrize(
    "target", ["../../etc/passwd", "/etc/passwd", "..", "sub/part.bin", "a\\b.bin", "tokenizer.json", ""]
)
def test_an_index_that_leaves_its_folder(target: str, hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    refused(hf, "points to")


@pytest.mark.parametrize("target", [7, None, ["a"], {"b": "c"}])
def test_an_index_of_other_things(target: object, hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    refused(hf, "lm_head.weight")


def test_a_lone_pointer_of_git_lfs(hf: Path) -> None:
    (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(hf, "Git LFS pointer", "git lfs pull")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is no folder and no GGUF file")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, "is not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "not an object")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    refused(tmp_path, "is not JSON")
    (tmp_path / "config.json").write_text('{"model_type": 1' + "0" * 10_000 + "}")
    refused(tmp_path, "is not JSON")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path, "'gpt2'", "llava_next")


def test_files_that_may_not_be_read(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file it is, and however the system says so."""
    unguarded = Path.open

    def guarded(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return unguarded(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    for secret in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        refused(made["1.5"], secret, "Permission denied")


def test_names_that_no_file_can_have() -> None:
    for name in ("~nobodyhere/x", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no model named") as caught:
            store.resolve(name)
        assert len(caught.value.message) < 200


def test_companions_that_have_no_place(made: dict[str, Path]) -> None:
    refused(made["1.5"], "has no place", beside=[made["1.6"]])
    refused(made["1.5"], "both a base", beside=[made["1.5"], made["1.6"]])


# --- what pumice does not have ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config__model_type": "gemma"}, "gemma"),
        ({"text_config__hidden_act": "gelu"}, "hidden_act"),
        ({"text_config__attention_bias": True}, "attention_bias"),
        ({"text_config__mlp_bias": True}, "mlp_bias"),
        ({"text_config__rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is of type 'yarn'"),
        ({"text_config__rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"text_config__rope_scaling": {"rope_type": "su", "short_factor": [1.0] * 8}}, "'su'"),
        ({"text_config__rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0"),
        ({"text_config__rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "8 numbers above zero"),
        ({"text_config__rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "no factor"),
        (
            {
                "text_config__rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "more than low_freq_factor",
        ),
        ({"text_config__rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"text_config__head_dim": 15}, "even"),
        ({"text_config__num_key_value_heads": 3}, "num_key_value_heads"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"text_config__hidden_size": -64}, "hidden_size"),
        ({"text_config__hidden_size": "64"}, "hidden_size"),
        ({"text_config__vocab_size": True}, "vocab_size"),
        ({"text_config__rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"text_config__rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"text_config": []}, "text_config"),
        ({"vision_config__model_type": "siglip_vision_model"}, "siglip"),
        ({"vision_config__hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"vision_config__num_attention_heads": 5}, "num_attention_heads"),
        ({"vision_config__num_channels": 4}, "num_channels"),
        ({"vision_config__patch_size": 56}, "patch_size"),
        ({"vision_feature_layer": 9}, "layer"),
        ({"vision_feature_layer": [-2, 10**9]}, "vision_feature_layer"),
        ({"vision_feature_layer": []}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "cls"}, "'cls'"),
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"image_token_index": 9, "image_token_id": ...}, "<image> is token 9"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "llava_onevision"}, "llava_onevision"),
        ({"model_type": "../llava"}, "../llava"),
        ({"model_type": ["llava"]}, "model_type"),
        ({"pumice_template": "x"}, "'x'"),
    ],
    ids=str,
)
def test_refused_configs(changes: dict[str, object], words: str, hf: Path) -> None:
    edit(hf / "config.json", **changes)
    refused(hf, words)


def test_llava_next_has_no_class_token(hf16: Path) -> None:
    edit(hf16 / "config.json", vision_feature_select_strategy="full")
    refused(hf16, "'full'", "llava_next")


def test_what_would_run_code_is_not_looked_at(hf: Path) -> None:
    before = checkpoints.read(hf).config
    (hf / "modeling_evil.py").write_text("raise SystemExit('executed')")
    edit(
        hf / "config.json",
        auto_map={"AutoModel": "modeling_evil.Evil"}, trust_remote_code=True, code_revision="main",
        _attn_implementation_internal="someone/kernel", attn_implementation="someone/kernel",
    )  # fmt: skip
    edit(
        hf / "tokenizer_config.json",
        tokenizer_class="modeling_evil.Evil",
        auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]},
    )
    edit(hf / "preprocessor_config.json", auto_map={"AutoImageProcessor": "modeling_evil.Evil"})
    assert checkpoints.read(hf).config == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 10**9}, "size"),
        ({"size": {"shortest_edge": 10**9}}, "size"),
        ({"size": {"shortest_edge": -28}}, "size"),
        ({"size": {"shortest_edge": "28"}}, "size"),
        ({"size": {"height": 28}}, "size"),
        ({"size": {"shortest_edge": 28, "longest_edge": 99}}, "size"),
        ({"size": True}, "size"),
        ({"size": [28, 28]}, "size"),
        ({"crop_size": 56}, "crop_size"),
        ({"crop_size": {"height": 28, "width": 56}}, "crop_size"),
        ({"crop_size": ...}, "crop_size"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_normalize": "yes"}, "do_normalize"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, 1e400]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, "0.5"]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"resample": 99}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
    ],
    ids=str,
)
def test_refused_preprocessing(changes: dict[str, object], words: str, hf: Path) -> None:
    edit(hf / "preprocessor_config.json", **changes)
    refused(hf, words)


@pytest.mark.parametrize(
    "pairs",
    [
        [[28, 56]] * 10**5,
        [],
        "(1x1),(2x2)",
        [[28, 57]],
        [[0, 28]],
        [[-28, 28]],
        [[10**9 * 28, 28]],
        [[28 * 13, 28 * 5]],
        [[28]],
        [["28", "28"]],
        [28],
    ],
    ids=lambda each: str(each)[:30],
)
def test_refused_pinpoints(pairs: object, hf16: Path) -> None:
    edit(hf16 / "preprocessor_config.json", image_grid_pinpoints=pairs)
    assert "image_grid_pinpoints" in str(refused(hf16))


def test_pinpoints_of_two_minds(hf16: Path) -> None:
    edit(hf16 / "preprocessor_config.json", image_grid_pinpoints=[[28, 56]])
    refused(hf16, "different image_grid_pinpoints")
    edit(hf16 / "config.json", image_grid_pinpoints=[[28, 56]])
    image = checkpoints.read(hf16).config.image
    assert image is not None
    assert image.pinpoints == ((28, 56),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_projector_type": "identity"}, "identity"),
        ({"mm_projector_type": "mlp99x_gelu"}, "mlp99x_gelu"),
        ({"mm_projector_type": "mlp3x_gelu"}, "multi_modal_projector.linear_3"),
        ({"mm_projector_type": "linear"}, "mm_projector.2"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_patch_merge_type": "spatial"}, "spatial"),
        ({"mm_patch_merge_type": ...}, "flat"),
        ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
        ({"image_aspect_ratio": "pad"}, "mm_patch_merge_type"),
        ({"image_grid_pinpoints": ...}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "[(28, 56)]"}, "image_grid_pinpoints"),
        ({"mm_vision_select_layer": ...}, "mm_vision_select_layer"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
    ],
    ids=str,
)
def test_refused_authors_configs(changes: dict[str, object], words: str, made: dict[str, Path], tmp_path: Path) -> None:
    folder = authors_folder(made, tmp_path, tower=True)
    edit(folder / "config.json", **changes)
    refused(folder, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 10**9}, "1000000000"),
        ({"r": 0}, "r is 0"),
        ({"r": 4}, "rank 4"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "'all'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"base_model_name_or_path": "lmsys/elsewhere"}, "language model under it"),
    ],
    ids=str,
)
def test_refused_adapters(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    root = reference("golden/models-original")
    for name in ("llava-v1.5-tiny-lora", "vicuna-tiny", "llava-v1.5-tiny-clip"):
        shutil.copytree(root / name, tmp_path / name)
    folder = tmp_path / "llava-v1.5-tiny-lora"
    edit(folder / "adapter_config.json", **changes)
    refused(folder, words)


def test_incomplete_adapters(tmp_path: Path) -> None:
    root = reference("golden/models-original")
    for name in ("llava-v1.5-tiny-lora", "vicuna-tiny", "llava-v1.5-tiny-clip"):
        shutil.copytree(root / name, tmp_path / name)
    folder = tmp_path / "llava-v1.5-tiny-lora"
    file, key = folder / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    good = file.read_bytes()
    resave(file, lambda tensors: tensors.pop(key))
    refused(folder, "one factor", "layers.0.mlp.up_proj")
    file.write_bytes(good)
    resave(file, lambda tensors: tensors.update({key.replace("layers.0", "layers.9"): tensors.pop(key)}))
    refused(folder, "layers.")
    file.write_bytes(good)
    resave(file, lambda tensors: tensors.update({"x": torch.ones(1)}))
    refused(folder, "'x'", "no factor")
    file.write_bytes(good)
    resave(file, lambda tensors: tensors.update({key.replace("A.weight", "A.default.weight"): tensors[key] * 0}))
    refused(folder, "the same factor")
    file.unlink()
    refused(folder, "adapter_model")


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["1.5", "1.6"])
@pytest.mark.parametrize("shard", [2**30, 60_000])
def test_written_folders_are_read_by_both(family: str, shard: int, made: dict[str, Path], tmp_path: Path) -> None:
    first, folder = checkpoints.read(made[family]), tmp_path / "out" / "model"
    checkpoints.write_hf(folder, first.config, first.tensors, tokenizer_files=made[family], max_shard_bytes=shard)
    again = checkpoints.read(folder)
    assert again.config == first.config
    same(again.tensors, dict(first.tensors))
    assert (folder / "model.safetensors.index.json").exists() == (shard < 2**30)
    assert [each.name for each in folder.parent.iterdir()] == ["model"]
    keys = set().union(*(load_file(file) for file in folder.glob("*.safetensors")))
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= keys
    assert "vision_tower.vision_model.pre_layrnorm.weight" in keys
    same(in_memory(transformers_model(folder)), dict(first.tensors))

    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert processor.apply_chat_template(turn, add_generation_prompt=True) == "USER: <image>\nHi ASSISTANT:"


def test_written_shards_are_as_large_as_allowed(made: dict[str, Path], tmp_path: Path) -> None:
    first = checkpoints.read(made["1.6"])
    checkpoints.write_hf(
        tmp_path / "x", first.config, first.tensors, tokenizer_files=made["1.6"], max_shard_bytes=50_000
    )
    files = sorted((tmp_path / "x").glob("model-*.safetensors"))
    assert len(files) > 5
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= 50_000
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == first.tensors.nbytes
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_written_language_models(tmp_path: Path) -> None:
    for config in (
        LlamaConfig(vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        Qwen2Config(
            vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    ):  # fmt: skip
        source = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
        tiny._tokenizer(tiny.LANGUAGE_MODELS["vicuna"]).save(str(source / "tokenizer.json"))
        first = checkpoints.read(source)
        folder = tmp_path / f"{config.model_type}-out"
        checkpoints.write_hf(folder, first.config, first.tensors, tokenizer_files=source)
        assert checkpoints.read(folder).config == first.config
        same(checkpoints.read(folder).tensors, dict(first.tensors))
        written = transformers_model(folder)
        assert type(written).__name__ == type(AutoModelForCausalLM.from_config(config)).__name__
        assert isinstance(written, LlamaForCausalLM) == (config.model_type == "llama")


def test_written_type_and_template(made: dict[str, Path], tmp_path: Path) -> None:
    first = checkpoints.read(made["1.5"], template="plain")
    config = dataclasses.replace(first.config, stop_ids=(2, 5))
    checkpoints.write_hf(tmp_path / "x", config, first.tensors, tokenizer_files=made["1.5"], dtype=torch.bfloat16)
    again = checkpoints.read(tmp_path / "x")
    assert again.config == config
    assert not (tmp_path / "x" / "chat_template.json").exists()
    same(again.tensors, {name: tensor.to(torch.bfloat16) for name, tensor in first.tensors.items()})
    assert transformers_model(tmp_path / "x").dtype == torch.bfloat16


def test_every_number_is_written(made: dict[str, Path], tmp_path: Path) -> None:
    """Numbers that differ from all defaults come back, here and in Transformers."""
    first = checkpoints.read(made["1.5"])
    vision, text, image = first.config.vision, first.config.text, first.config.image
    assert vision is not None
    assert image is not None
    config = dataclasses.replace(
        first.config,
        vision=dataclasses.replace(
            vision, heads=2, activation="gelu", norm_eps=3e-5, feature_layers=(-1,), keep_class_token=True
        ),
        text=dataclasses.replace(
            text, heads=8, kv_heads=8, head_width=8, rotary=Rotary(123.0), norm_eps=3e-6, max_positions=77
        ),
        image=dataclasses.replace(
            image, mode="pad", resize_px=(30, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), rescale=0.5, resample=2
        ),
    )
    checkpoints.write_hf(tmp_path / "x", config, first.tensors, tokenizer_files=made["1.5"])
    assert checkpoints.read(tmp_path / "x").config == config
    theirs = transformers_model(tmp_path / "x").config
    tower, lm = theirs.vision_config, theirs.text_config
    assert (tower.hidden_act, tower.layer_norm_eps, tower.num_attention_heads) == ("gelu", 3e-5, 2)
    assert (lm.rope_parameters["rope_theta"], lm.rms_norm_eps, lm.max_position_embeddings) == (123.0, 3e-6, 77)
    assert (theirs.vision_feature_layer, theirs.vision_feature_select_strategy) == (-1, "full")


def test_a_folder_is_written_whole_or_not_at_all(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoints.read(made["1.5"])
    folder = tmp_path / "model"

    def write() -> None:
        checkpoints.write_hf(folder, first.config, first.tensors, tokenizer_files=made["1.5"])

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full_disk)
        with pytest.raises(UserError, match="No space"):
            write()
    assert list(tmp_path.iterdir()) == []
    write()
    with pytest.raises(UserError, match="there already"):
        write()
    with pytest.raises(UserError, match=r"image_newline|lm_head"):
        checkpoints.write_hf(
            tmp_path / "y",
            first.config,
            {k: v for k, v in first.tensors.items() if k != "lm_head.weight"},
            tokenizer_files=made["1.5"],
        )


def test_what_a_hugging_face_folder_cannot_say(made: dict[str, Path], tmp_path: Path) -> None:
    first = checkpoints.read(made["1.6"])
    assert first.config.image is not None
    assert first.config.projector is not None
    for config, words in (
        (dataclasses.replace(first.config, image=first.config.image.under("original")), "authors' rules"),
        (
            dataclasses.replace(first.config, projector=dataclasses.replace(first.config.projector, layers=1)),
            "projector",
        ),
        (dataclasses.replace(first.config, image_token_id=-200), "<image> is token -200"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoints.write_hf(tmp_path / "x", config, {}, tokenizer_files=made["1.6"])
    assert not (tmp_path / "x").exists()
