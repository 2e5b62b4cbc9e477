"""Folders of the LLaVA authors as a destination: their keys and configs, what they compute, and the way back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pumice
import tiny
from conftest import reference
from pumice import UserError, checkpoints
from pumice.checkpoints.origin import SOURCE_FILE
from pumice.checkpoints.original import TOWER_KEY
from pumice.checkpoints.original_writer import OPENAI, check_sayable, openai_tower, original_key, prepared_as_clip
from pumice.checkpoints.tensors import open_weights
from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from pumice.conversion import Choices
from test_cli import Command, command  # noqa: F401 (a fixture)
from test_convert import agree, same_tensors
from test_gguf import logits, pair

THEIRS = Choices(format="original")
TOWER = "model.vision_tower.vision_tower.vision_model."
FAMILIES = [("1.5", "vicuna"), ("1.6", "vicuna"), ("1.5", "yi"), ("1.6", "mistral"), ("1.6", "llama3")]


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def small(folder: Path) -> dict[str, bytes]:
    weights = (".safetensors", ".bin", ".index.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(weights)}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """By the keys of the files."""
    return {key: each.dense() for key, each in open_weights(folder).items()}


# --- from Hugging Face ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "lm"), FAMILIES)
def test_there_and_back(family: str, lm: str, tmp_path: Path) -> None:
    """It computes what the folder does; the way back leads to the same small files and the same tensors."""
    source, theirs = tiny.hf_folder(tmp_path / "hf", family=family, lm=lm, seed=5), tmp_path / "llava"
    (source / "LICENSE").write_text("mine")
    (source / "picture.png").write_bytes(b"\x89PNG\xff")
    report = pumice.convert(source, theirs, choices=THEIRS)
    assert report.written[0].tensors == len(open_weights(source))
    agree(theirs, source)
    found = checkpoints.read(theirs)
    assert found.format == "original"
    same_tensors(dict(found.tensors), dict(checkpoints.read(source).tensors))
    for name in ("LICENSE", "picture.png", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (theirs / name).read_bytes() == (source / name).read_bytes(), name
    report = pumice.convert(theirs, tmp_path / "back")
    assert report.notes == ()
    assert small(tmp_path / "back") == small(source)
    same_tensors(dict(checkpoints.read(tmp_path / "back").tensors), dict(found.tensors))


def test_by_the_parts_that_the_authors_code_has(tmp_path: Path) -> None:
    """Transformers' Llama and CLIP, and a Sequential, under the keys that the authors' classes have; no pumice."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    source, theirs = tiny.hf_folder(tmp_path / "hf", family="1.5", lm="vicuna", seed=3), tmp_path / "llava"
    pumice.convert(source, theirs, choices=THEIRS)
    said, state = config_of(theirs), load_file(theirs / "model.safetensors")
    assert said["model_type"] == "llava_llama"
    assert said["architectures"] == ["LlavaLlamaForCausalLM"]
    assert said["mm_projector_type"] == "mlp2x_gelu"

    def part(stem: str, new: str = "") -> dict[str, torch.Tensor]:
        return {new + key.removeprefix(stem): state.pop(key) for key in list(state) if key.startswith(stem)}

    tower = CLIPVisionModel(CLIPVisionConfig(**said[TOWER_KEY]["vision_config"])).eval()
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in tower.state_dict()) else ""
    tower.load_state_dict(part(TOWER, prefix))
    width_in, width = said["mm_hidden_size"], said["hidden_size"]
    linear = torch.nn.Linear
    projector = torch.nn.Sequential(linear(width_in, width), torch.nn.GELU(), linear(width, width))
    projector.load_state_dict(part("model.mm_projector."))
    llama = LlamaForCausalLM(LlamaConfig(**{key: said[key] for key in said if not key.startswith(("mm_", "pumice_"))}))
    llama.eval().load_state_dict(state)

    ours = pumice.load(theirs, dtype="float32")
    seen = ours.see(pumice.Question("What is shown?", Path(__file__).parent.parent / "docs/images/sign.png"))
    ids = torch.tensor(seen.encoded.ids)
    with torch.inference_mode():
        states = tower(torch.from_numpy(seen.images[0].pixels), output_hidden_states=True).hidden_states
        features = projector(states[said["mm_vision_select_layer"]][0, 1:])
        embedded = llama.get_input_embeddings()(ids.clamp(min=0))
        embedded[ids == ours.config.image_token_id] = features
        expected = llama(inputs_embeds=embedded[None]).logits[0]
    found = logits(ours, seen)
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["pebble", "pebble:1.5"])
def test_pebble_by_the_command_line(command: Command, name: str, tmp_path: Path) -> None:  # noqa: F811
    """Tied embeddings, a small tower; and a killed run leaves what any other does, for the writing is the same."""
    done = command("convert", name, tmp_path / "llava-p", "--format", "original", "--json")
    assert done.code == 0, done.err
    notes = json.loads(done.out)["notes"]
    assert any("mm_vision_tower: name a folder" in note for note in notes)
    assert any("no tokenizer.model" in note for note in notes)
    assert not any("folder's name" in note for note in notes)
    image = Path(__file__).parent.parent / "docs/images/sign.png"
    found, wanted = (pumice.load(each).ask("What does the sign say?", image) for each in (tmp_path / "llava-p", name))
    assert found.tokens == wanted.tokens
    done = command("convert", tmp_path / "llava-p", tmp_path / "back", "--format", "hf")
    assert done.code == 0, done.err
    source = checkpoints.read(pumice.source.store.resolve(name)).path
    assert small(tmp_path / "back") == small(source)
    same_tensors(load_file(tmp_path / "back/model.safetensors"), load_file(source / "model.safetensors"))


# --- from the authors' own --------------------------------------------------------------------------------------------

GOLDEN = {
    "llava-v1.5-tiny": "llava-v1.5-tiny-clip",
    "llava-v1.6-vicuna-tiny": None,
    "llava-v1.6-mistral-tiny": None,
}


@pytest.mark.parametrize("way", ["straight", "by hf", "by gguf"])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_authors_folders_come_back(name: str, way: str, tmp_path: Path) -> None:
    """The same keys and tensors, a separate tower among them, and the same small files; in config.json what is new."""
    root = reference("golden/models-original")
    middle = {"straight": root / name, "by hf": tmp_path / "hf", "by gguf": tmp_path / "m.gguf"}[way]
    if way != "straight":
        pumice.convert(root / name, middle)
    pumice.convert(middle, tmp_path / "llava-mistral", choices=THEIRS)
    wanted = stored(root / name)
    if clip := GOLDEN[name]:
        towers = stored(root / clip)
        wanted |= {f"model.vision_tower.vision_tower.{key}": each for key, each in towers.items()}
    same_tensors(stored(tmp_path / "llava-mistral"), wanted)
    before, after = small(root / name), small(tmp_path / "llava-mistral")
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {"config.json"}
    old, new = config_of(root / name), config_of(tmp_path / "llava-mistral")
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed - {"unfreeze_mm_vision_tower"} == {"pumice_template", TOWER_KEY}
    assert new["unfreeze_mm_vision_tower"] is True
    agree(tmp_path / "llava-mistral", root / name)


def test_rows_that_a_vocabulary_got(tmp_path: Path) -> None:
    """For `<image>`, in Hugging Face's format; the way back keeps them and takes the old tokenizer's files again."""
    root = reference("golden/models-original")
    source = tmp_path / "source"
    pumice.convert(root / "llava-v1.5-tiny", source, choices=THEIRS)
    state = load_file(source / "model.safetensors")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        state[key] = state[key][:400].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config_of(source) | {"vocab_size": 400}), encoding="utf-8")
    pumice.convert(source, tmp_path / "hf")
    pumice.convert(tmp_path / "hf", tmp_path / "back", choices=THEIRS)
    found = stored(tmp_path / "back")
    assert found["lm_head.weight"].shape == (448, 64)
    assert config_of(tmp_path / "back")["vocab_size"] == 448
    same_tensors({key: each[:400] if key in ("lm_head.weight", "model.embed_tokens.weight") else each
                  for key, each in found.items()}, state)  # fmt: skip
    before, after = small(source), small(tmp_path / "back")
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {"config.json"}
    agree(tmp_path / "back", source)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    root = reference("golden/models-original")
    beside = [root / "vicuna-tiny", root / "llava-v1.5-tiny-clip"]
    pumice.convert(root / "llava-v1.5-tiny-lora", tmp_path / "hf", beside=beside)
    for number, source in enumerate((root / "llava-v1.5-tiny-lora", tmp_path / "hf")):
        out = tmp_path / f"llava-{number}"
        pumice.convert(source, out, beside=[] if number else beside, choices=THEIRS)
        assert not (out / "adapter_config.json").exists()
        assert config_of(out)["mm_vision_tower"] == "llava-v1.5-tiny-clip"
        agree(out, root / "llava-v1.5-tiny-lora", beside=beside)


def test_a_tower_s_own_words_count(tmp_path: Path) -> None:
    """Not those of a CLIP folder that happens to lie beside; one that is named does count."""
    root = reference("golden/models-original")
    other = tmp_path / "llava-v1.5-tiny-clip"
    other.mkdir()
    said = json.loads((root / other.name / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(said | {"num_attention_heads": 2}), encoding="utf-8")
    pumice.convert(root / "llava-v1.5-tiny", tmp_path / "llava", choices=THEIRS)
    wanted = checkpoints.read(root / "llava-v1.5-tiny").config.vision
    assert wanted is not None
    assert checkpoints.read(tmp_path / "llava").config.vision == wanted
    found = checkpoints.read(tmp_path / "llava", beside=[other]).config.vision
    assert found == dataclasses.replace(wanted, heads=2)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "today"])
def test_a_pair_of_others(legacy: bool, tmp_path: Path) -> None:
    """Without a word of where it came from; the first converters left the last block and the last norm out."""
    source = tiny.hf_folder(tmp_path / "hf", family="1.6", lm="mistral", seed=6)
    path, template = pair(source, tmp_path / "pair", legacy=legacy), checkpoints.read(source).config.template
    choices = dataclasses.replace(THEIRS, template=template)
    report = pumice.convert(path, tmp_path / "out", choices=choices)
    agree(tmp_path / "out", path, template=template)
    assert any("last norm" in note for note in report.notes) == legacy
    assert any("must have llava and mistral in it" in note for note in report.notes)
    assert config_of(tmp_path / "out")["model_type"] == "llava_mistral"
    assert config_of(tmp_path / "out")["mm_vision_select_layer"] == 2
    assert not (tmp_path / "out" / SOURCE_FILE).exists()


# --- what a config says -----------------------------------------------------------------------------------------------


def edited(folder: Path, **text: Any) -> Path:
    """The folder with other values in its text_config."""
    config = config_of(folder)
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_window_and_linear_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    source = edited(tiny.hf_folder(tmp_path / "hf", lm="mistral"), sliding_window=40, rope_parameters=rope)
    wanted = checkpoints.read(source).config.text
    assert wanted.window == 40
    assert set(wanted.rotary.divisors) == {2.0}
    pumice.convert(source, tmp_path / "llava", choices=THEIRS)
    assert checkpoints.read(tmp_path / "llava").config.text == wanted
    assert config_of(tmp_path / "llava")["rope_scaling"] == {"type": "linear", "factor": 2.0}
    agree(tmp_path / "llava", source)


def test_projectors_of_other_depths(tmp_path: Path) -> None:
    """Which Transformers has not: from the authors' to the authors'."""
    source = tiny.hf_folder(tmp_path / "hf", family="1.5")
    for layers, name in ((1, "linear"), (3, "mlp3x_gelu")):
        folder = tmp_path / name
        pumice.convert(source, folder, choices=THEIRS)
        state = load_file(folder / "model.safetensors")
        for part, shape in (("weight", (64, 64)), ("bias", (64,))):
            first = state.pop(f"model.mm_projector.0.{part}")
            last = state.pop(f"model.mm_projector.2.{part}")
            if layers == 1:
                state[f"model.mm_projector.{part}"] = first
            else:
                middle = torch.randn(shape, generator=torch.manual_seed(1)) / 8
                keys = [f"model.mm_projector.{place}.{part}" for place in (0, 2, 4)]
                state |= dict(zip(keys, (first, middle, last), strict=True))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = config_of(folder) | {"mm_projector_type": name}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        pumice.convert(folder, tmp_path / f"llava-{name}", choices=THEIRS)
        same_tensors(stored(tmp_path / f"llava-{name}"), state)
        agree(tmp_path / f"llava-{name}", folder)
        with pytest.raises(UserError, match=r"--format original"):
            pumice.convert(folder, tmp_path / "no")


CLIP_L = VisionConfig(336, 14, 1024, 24, 16, 4096)
CLIP_IMAGE = ImageConfig("pad", 336, 336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def test_which_towers_are_openai_s() -> None:
    assert openai_tower(CLIP_L) == OPENAI[336] == "openai/clip-vit-large-patch14-336"
    assert openai_tower(dataclasses.replace(CLIP_L, image_px=224)) == "openai/clip-vit-large-patch14"
    left = dataclasses.replace(CLIP_L, layers=23, feature_layers=(23,), post_norm=False)
    assert openai_tower(left) == OPENAI[336]
    others: dict[str, Any] = {"heads": 8, "activation": "gelu", "norm_eps": 1e-6, "layers": 23, "patch_px": 28}
    for key, value in others.items():
        assert openai_tower(dataclasses.replace(CLIP_L, **{key: value})) is None, key
    rounded = dataclasses.replace(CLIP_IMAGE, mean=(0.48145467042922974, 0.4578275084495544, 0.40821072459220886))
    assert prepared_as_clip(CLIP_IMAGE)
    assert prepared_as_clip(rounded)
    for key, value in {"resize_px": (336, 336), "resample": 2, "mean": (0.5, 0.5, 0.5)}.items():
        assert not prepared_as_clip(dataclasses.replace(CLIP_IMAGE, **{key: value})), key


def test_keys() -> None:
    two, one = ProjectorConfig(), ProjectorConfig(layers=1)
    assert original_key("multi_modal_projector.linear_2.bias", two) == "model.mm_projector.2.bias"
    assert original_key("multi_modal_projector.linear_1.bias", one) == "model.mm_projector.bias"
    assert original_key("lm_head.weight", two) == "lm_head.weight"
    assert original_key("image_newline", two) == "model.image_newline"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"qkv_bias": True}, "has biases"),
    ("text", {"head_width": 8}, "has heads of another width"),
    ("rotary", {"divisors": (1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)}, "frequencies one by one"),
    ("rotary", {"magnitude": 1.2}, "magnitude"),
    ("projector", {"bias": False}, "without biases"),
    ("projector", {"layers": 10}, "more than 9"),
    ("vision", {"feature_layers": (-2, -3)}, "several layers"),
    ("vision", {"keep_class_token": True}, "class token"),
]


@pytest.mark.parametrize(("part", "change", "words"), REFUSED, ids=lambda each: str(each)[:12])
def test_what_they_cannot_say(part: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config: LlavaConfig = checkpoints.read(tiny.hf_folder(tmp_path / "hf")).config
    check_sayable(config)
    if part == "rotary":
        part, change = "text", {"rotary": dataclasses.replace(config.text.rotary, **change)}
    new: Any = dataclasses.replace(config.__dict__[part], **change)
    with pytest.raises(UserError, match=words):
        check_sayable(dataclasses.replace(config, **{part: new}))


def test_choices_that_are_refused(tmp_path: Path) -> None:
    source = tiny.hf_folder(tmp_path / "hf", family="1.5")
    text = reference("golden/models-original") / "vicuna-tiny"
    for words, src, name, choices in (
        ("without eyes", text, "x", THEIRS),
        ("the format of a folder came", source, "x.gguf", THEIRS),
        ("format is 'zip'", source, "x", Choices(format="zip")),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=words):
            pumice.convert(src, tmp_path / name, choices=choices)
    assert [each.name for each in tmp_path.iterdir()] == ["hf"]


# --- what a folder remembers ------------------------------------------------------------------------------------------


def test_another_type_of_weights(tmp_path: Path) -> None:
    """The way back says the type that the weights have then."""
    source = tiny.hf_folder(tmp_path / "hf", family="1.5")
    pumice.convert(source, tmp_path / "llava", choices=dataclasses.replace(THEIRS, dtype="bfloat16"))
    assert config_of(tmp_path / "llava")["torch_dtype"] == "bfloat16"
    pumice.convert(tmp_path / "llava", tmp_path / "back")
    old, new = config_of(source), config_of(tmp_path / "back")
    assert (old.pop("dtype"), new.pop("dtype")) == ("float32", "bfloat16")
    for part in ("text_config", "vision_config"):
        if "dtype" in old[part]:
            assert (old[part].pop("dtype"), new[part].pop("dtype")) == ("float32", "bfloat16")
    assert old == new
    assert {each.dtype for each in stored(tmp_path / "back").values()} == {torch.bfloat16}


def test_a_folder_that_was_changed_is_not_put_back(tmp_path: Path) -> None:
    """Its own files count then."""
    source, theirs = tiny.hf_folder(tmp_path / "hf", family="1.5"), tmp_path / "llava"
    pumice.convert(source, theirs, choices=THEIRS)
    config = config_of(theirs) | {"rope_theta": 5e5}
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pumice.convert(theirs, tmp_path / "back")
    assert checkpoints.read(tmp_path / "back").config.text.rotary.theta == 5e5
    assert small(tmp_path / "back")["config.json"] != small(source)["config.json"]
    agree(tmp_path / "back", theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../evil": "x"}}, "is not the name of a small file"),
        ({"files": {"model.safetensors": "x"}}, "is not the name of a small file"),
        ({"files": {"config.json": 3}}, "a string"),
        ({"files": []}, "an object"),
        ({"format": "zip"}, "'hf' or 'original'"),
        ({"beside": None}, "has no beside"),
    ],
)
def test_a_damaged_memory(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    source, theirs = tiny.hf_folder(tmp_path / "hf", family="1.5"), tmp_path / "llava"
    pumice.convert(source, theirs, choices=THEIRS)
    path = theirs / SOURCE_FILE
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        pumice.convert(theirs, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert pumice.load(theirs).config.family == "llava-1.5"
