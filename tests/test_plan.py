"""What a model takes, against what really lies in memory; whether it fits, in memories of any size; the probe."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import pumice
import tiny
from pumice import UserError
from pumice.checkpoints.mixes import MIXES
from pumice.conversion import Choices
from pumice.engine import Engine, position_bytes
from pumice.image import prepare
from pumice.model import DTYPES, Model, Source, load_from
from pumice.network.placement import Placement
from pumice.quant import QTensor
from pumice.room import memory as system
from pumice.room.fitting import Machine, advice, check, gpu_layers, judged, verdict, ways
from pumice.room.footprint import Footprint, Share, as_mix, footprint, grids, least, smallest
from pumice.room.memory import Memory, host, shown
from pumice.tasks import pace
from pumice.tasks.plan import Plan, plan
from test_cli import Command, command, refused  # noqa: F401 (a fixture)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LLaVA 1.6 in every kind of file."""
    root = tmp_path_factory.mktemp("plan")
    whole = tiny.hf_folder(root / "hf", family="1.6", lm="mistral", seed=3)
    found = {"hf": whole}
    for dtype in ("bfloat16", "float16"):
        found[dtype] = root / dtype
        pumice.convert(whole, found[dtype], choices=Choices(dtype=dtype))
    found["original"] = root / "original"
    pumice.convert(whole, found["original"], choices=Choices(format="original"))
    for quant in ("F32", "F16", "Q4_0", "Q8_0", "Q4_K_M"):
        found[quant] = root / f"{quant}.gguf"
        pumice.convert(whole, found[quant], quant=quant)
    found["q8-eyes"] = root / "q8-eyes.gguf"
    pumice.convert(whole, found["q8-eyes"], quant="Q4_0", vision="q8_0")
    return found


class Pretended(Machine):
    """A machine with memories of any size."""

    def __init__(self, cpu: Memory | None, gpu: Memory | None = None) -> None:
        self._cpu, self._gpu = cpu, gpu

    def memory(self, device: torch.device) -> Memory | None:
        return self._cpu if device.type == "cpu" else self._gpu

    def gpu(self) -> torch.device | None:
        return CUDA if self._gpu else None


def of(path: Path, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Footprint:
    checkpoint = Source(path).checkpoint()
    return footprint(checkpoint.tensors, checkpoint.config, dtype, device)


def free(count: int) -> Memory:
    """A large machine with so much free."""
    return Memory(10**15, count)


# --- bytes ------------------------------------------------------------------------------------------------------------


def tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """What lies in memory, by pumice's names, once a picture has been seen."""
    seen = prepare(Image.effect_noise((60, 45), 90).convert("RGB"), *model.eyes())
    model.features([seen])
    yield from model.network.named_parameters()
    for path, module in model.network.named_modules():
        weight = module.__dict__.get("weight")
        if isinstance(weight, QTensor):
            yield f"{path}.weight", weight.data_RB


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether it lies in pages of a file, as the kernel says."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        first, last = (int(each, 16) for each in fields[0].split("-"))
        if first <= at < last:
            return len(fields) == 6 and fields[5].endswith((".gguf", ".safetensors", ".bin"))
    raise AssertionError("the tensor lies nowhere")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says where a tensor lies")
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["hf", "bfloat16", "float16", "original", "F32", "F16", "Q4_0", "Q8_0", "Q4_K_M", "q8-eyes"]
)
def test_weights_lie_in_memory_as_planned(builds: dict[str, Path], name: str, dtype: str | None) -> None:
    model = load_from(Source(builds[name]), dtype=dtype, device="cpu")
    lies = {"text": Share(), "eyes": Share()}
    for path, each in tensors(model):
        part = "text" if path.startswith(("language_model.", "lm_head.")) else "eyes"
        lies[part] += Share(mapped=each.nbytes) if is_mapped(each) else Share(own=each.nbytes)
    found = of(builds[name], None if dtype is None else DTYPES[dtype])
    assert lies == {"text": found.text, "eyes": found.eyes}
    assert found.dtype == model.network.like.dtype
    blocks = [each for path, each in tensors(model) if path.startswith("language_model.layers.1.")]
    assert found.layers[1] == sum(each.nbytes for each in blocks)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["hf", "float16", "F16", "Q4_0"])
def test_keys_and_values_take_what_is_planned(builds: dict[str, Path], name: str, dtype: str | None) -> None:
    network = load_from(Source(builds[name]), dtype=dtype, device="cpu").network
    taken = Engine(network, positions=512).cache_bytes
    assert of(builds[name], None if dtype is None else DTYPES[dtype]).position_bytes * 512 == taken
    assert position_bytes(network) * 512 == taken


def test_a_gpu_holds_everything_itself(builds: dict[str, Path]) -> None:
    """Blocks stay blocks there, and all else has the type that is computed with."""
    found, checkpoint = of(builds["Q4_0"], torch.float16, CUDA), Source(builds["Q4_0"]).checkpoint()
    names = [name for name in checkpoint.tensors.names() if checkpoint.tensors.blocks(name)]
    blocks = sum(checkpoint.tensors.stored(name).nbytes for name in names)
    others = sum(math.prod(checkpoint.tensors.shape(name)) for name in checkpoint.tensors.names() if name not in names)
    assert found.weights == Share(own=blocks + 2 * others)
    # A matrix that many inputs meet is unpacked as a whole, into what is computed with.
    largest = max(math.prod(checkpoint.tensors.shape(name)) for name in names)
    assert found.widest == 2 * largest
    assert of(builds["Q4_0"], torch.float32, CUDA).widest == 4 * largest


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q2_K", "F16"])
def test_a_build_that_is_not_made_yet_has_the_size_it_will_have(
    builds: dict[str, Path], tmp_path: Path, quant: str
) -> None:
    checkpoint = Source(builds["hf"]).checkpoint()
    pumice.convert(builds["hf"], tmp_path / "made.gguf", quant=quant)
    made = Source(tmp_path / "made.gguf").checkpoint()
    thought = as_mix(checkpoint, MIXES[quant])
    assert {name: (thought.blocks(name), thought.dtype(name)) for name in thought} == {
        name: (made.tensors.blocks(name), made.tensors.dtype(name)) for name in made.tensors
    }
    weights = footprint(thought, checkpoint.config, None, CPU).weights.total
    assert weights == footprint(made.tensors, made.config, None, CPU).weights.total


def test_tokens_of_pictures_are_those_of_the_published_models() -> None:
    """576 for LLaVA 1.5; for 1.6 its paper's 2 x 2 canvas gives 2880 and one vector for each of 48 rows."""
    config = Source("pebble:1.5").checkpoint().config
    assert [each.tokens for each in grids(config).values()] == [config.vision.tile_tokens if config.vision else 0]
    pebble = Source("pebble").checkpoint().config
    assert pebble.vision is not None
    assert pebble.image is not None
    vision = dataclasses.replace(pebble.vision, image_px=336, patch_px=14)
    canvases = tuple((336 * rows, 336 * columns) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    next_ = dataclasses.replace(
        pebble, vision=vision, image=dataclasses.replace(pebble.image, pinpoints=canvases, rules="hf")
    )
    tokens = {name: each.tokens for name, each in grids(next_).items()}
    assert tokens == {"672x336": 1752, "336x672": 1776, "672x672": 2928, "336x1008": 2376, "1008x336": 2328}
    assert smallest(next_) == (1752 + 256, 3)
    assert least(next_) == (256, 0)


# --- memory -----------------------------------------------------------------------------------------------------------


def machine(root: Path, group: str, **files: str) -> Path:
    """Files of a system with 16 GB of which 6 are free; `files` by their path with __ for a slash."""
    texts = {
        "proc/meminfo": "MemTotal: 16000000 kB\nMemFree: 10 kB\nMemAvailable: 6000000 kB\nSwapFree: 1000000 kB\n",
        "proc/self/cgroup": group,
        **{name.replace("__", "/"): text for name, text in files.items()},
    }
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FREE_6 = Memory(16_000_000 * 1024, 6_000_000 * 1024, 1_000_000 * 1024)


def test_memory_without_limits(tmp_path: Path) -> None:
    assert host(machine(tmp_path, "")) == FREE_6
    assert host(machine(tmp_path, "0::/user.slice\n", sys__fs__cgroup__user__slice="")) == FREE_6


def group(folder: str, limit: str, used: int, cached: tuple[int, int] = (0, 0)) -> dict[str, str]:
    stat = f"anon 5\nfile 7\ninactive_file {cached[0]}\nactive_file {cached[1]}\n"
    at = "sys/fs/cgroup" + folder
    return {f"{at}/memory.max": f"{limit}\n", f"{at}/memory.current": f"{used}\n", f"{at}/memory.stat": stat}


def test_memory_in_control_groups(tmp_path: Path) -> None:
    """The least limit and the least free of all groups around the process count; pages of files are free."""
    inner, outer = group("/a/b", "max", 10), group("/a", str(4 * GB), 3 * GB, (GB, GB // 2))
    assert host(machine(tmp_path / "1", "0::/a/b\n", **inner, **outer)) == Memory(4 * GB, 5 * GB // 2)
    inner = group("/a/b", str(3 * GB), 2 * GB + 5)
    assert host(machine(tmp_path / "2", "1:cpu:/a\n0::/a/b\n", **inner, **outer)) == Memory(3 * GB, GB - 5)
    # In a container the path is that of the outside.
    own = group("", str(2 * GB), GB)
    assert host(machine(tmp_path / "3", "0::/../../pod/x\n", **own)) == Memory(2 * GB, GB)
    # The machine has less free than the group may take.
    assert host(machine(tmp_path / "6", "0::/\n", **group("", str(12 * GB), GB))) == Memory(12 * GB, FREE_6.available)
    # More used than allowed, and a limit beyond the machine.
    assert host(machine(tmp_path / "4", "0::/\n", **group("", str(GB), 2 * GB))) == Memory(GB, 0)
    assert host(machine(tmp_path / "5", "0::/\n", **group("", str(99 * GB), GB))) == FREE_6


def test_memory_in_control_groups_of_version_1(tmp_path: Path) -> None:
    at = "sys/fs/cgroup/memory"
    files = {
        f"{at}/box/memory.limit_in_bytes": f"{4 * GB}\n",
        f"{at}/box/memory.usage_in_bytes": f"{3 * GB}\n",
        f"{at}/box/memory.stat": f"cache 9\ntotal_inactive_file {GB}\ntotal_active_file 0\n",
        f"{at}/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        f"{at}/memory.usage_in_bytes": "12\n",
    }
    assert host(machine(tmp_path, "9:cpu:/box\n4:memory:/box\n", **files)) == Memory(4 * GB, 2 * GB)


@pytest.mark.parametrize("text", ["", "nothing", "\0\0", "MemTotal: 5 kB", "MemTotal: many kB\nMemAvailable: -1 kB"])
def test_memory_where_files_say_nothing(tmp_path: Path, text: str) -> None:
    """Then the C library is asked."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(text)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::\n\xff::\n4:memory\nx\n")
    found = host(tmp_path)
    assert found is not None
    assert 2**27 < found.available <= found.total < 2**50


def test_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(system.GIVEN, "1.5")
    assert host() == Memory(1_500_000_000, 1_500_000_000)
    for wrong in ("much", "-1", "nan", "inf", ""):
        monkeypatch.setenv(system.GIVEN, wrong)
        with pytest.raises(UserError, match=system.GIVEN):
            host()


# --- does it fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "memory", "said"),
    [
        (Share(mapped=4, own=1), Memory(16, 5), "fits"),
        (Share(mapped=4, own=1), Memory(16, 4), "tight"),  # other programs hold the rest
        (Share(mapped=4, own=1), Memory(5, 1), "tight"),
        (Share(mapped=4, own=1), Memory(4, 4), "no"),  # the file would be read from the disk again for each token
        (Share(mapped=4, own=2), Memory(16, 1), "no"),  # what cannot be dropped has no room
        (Share(mapped=4, own=2), Memory(16, 1, swap=1), "tight"),
        (Share(own=5), Memory(16, 4), "no"),
        (Share(own=4), Memory(16, 4), "fits"),
    ],
)
def test_the_rule(needs: Share, memory: Memory, said: str) -> None:
    assert verdict(needs, memory) == said


def test_a_model_is_refused_where_it_is_hopeless_and_only_there(builds: dict[str, Path]) -> None:
    for name in ("hf", "Q4_0"):
        checkpoint = Source(builds[name]).checkpoint()
        needs = of(builds[name]).needs(*least(checkpoint.config))
        assert needs.own < needs.total
        check(checkpoint, None, Placement(CPU), Pretended(Memory(needs.total, needs.own)))
        check(checkpoint, None, Placement(CPU), Pretended(None))
        for memory in (Memory(needs.total - 1, needs.total - 1), Memory(needs.total, needs.own - 1)):
            with pytest.raises(UserError, match=re.escape(shown(needs.total))):
                check(checkpoint, None, Placement(CPU), Pretended(memory))
        on_gpu = of(builds[name], device=CUDA).needs(*least(checkpoint.config))
        check(checkpoint, None, Placement(CUDA), Pretended(None, free(on_gpu.total)))
        with pytest.raises(UserError, match="the device cuda has"):
            check(checkpoint, None, Placement(CUDA), Pretended(None, free(on_gpu.total - 1)))


def test_a_model_without_room_for_a_picture_is_loaded(builds: dict[str, Path]) -> None:
    found = of(builds["hf"])
    for count, said in ((found.needs(*smallest(found.config)).total, "fits"), (found.weights.total, "no")):
        assert judged(found, Memory(count, count)) == said
    between = found.needs(*least(found.config)).total
    assert judged(found, Memory(between, between)) == "tight"
    assert judged(found, Memory(between - 1, between - 1)) == "no"


def test_a_model_that_was_dropped_makes_room(builds: dict[str, Path]) -> None:
    class Emptied(Machine):
        asked = 0

        def memory(self, device: torch.device) -> Memory | None:
            self.asked += 1
            return free(0) if self.asked == 1 else free(10**12)

    check(Source(builds["hf"]).checkpoint(), None, Placement(CPU), emptied := Emptied())
    assert emptied.asked == 2


def test_the_settings_that_are_named_do_fit(builds: dict[str, Path], tmp_path: Path) -> None:
    """Each is built, and its footprint taken anew: in the memory at hand, from nearly enough to nearly none."""
    checkpoint = Source(builds["hf"]).checkpoint()
    positions, tiles = smallest(checkpoint.config)
    for dtype, device in ((None, CPU), (torch.float32, CUDA), (torch.float64, CPU)):
        present = footprint(checkpoint.tensors, checkpoint.config, dtype, device).needs(positions, tiles).total
        counts = []
        for share in (0.98, 0.8, 0.6, 0.45, 0.35, 0.01):
            memory = free(int(present * share))
            pretended = Pretended(memory, memory if device == CUDA else None)
            found = ways(checkpoint, dtype, device, pretended)
            counts.append(len(found))
            assert len({each.setting for each in found}) == len(found)
            for way in found:
                assert way.bytes <= memory.available
                assert tried(way.setting, builds["hf"], tmp_path, dtype, device) == way.bytes
        assert counts[0] == 3
        assert counts[-1] == 0
        assert counts == sorted(counts, reverse=True)


def tried(setting: str, original: Path, root: Path, dtype: torch.dtype | None, device: torch.device) -> int:
    """What the model needs under the setting."""
    source = original
    if quant := re.search(r"--quant (\w+)$", setting):
        source, dtype = root / f"{quant[1]}.gguf", None
        pumice.convert(original, source, quant=quant[1], choices=Choices(force=True))
    elif setting == "--dtype bfloat16":
        dtype = torch.bfloat16
    elif setting == "without --dtype":
        dtype = None
    elif setting.startswith("--device "):
        device = torch.device(setting.removeprefix("--device "))
    checkpoint, place = Source(source).checkpoint(), None
    if setting.startswith("--gpu-layers "):
        place = Placement.of_layers(device, 3, int(setting.removeprefix("--gpu-layers ")))
    found = footprint(checkpoint.tensors, checkpoint.config, dtype, device, place)
    return found.needs(*smallest(checkpoint.config)).total


def test_the_advice_counts(builds: dict[str, Path]) -> None:
    checkpoint = Source(builds["hf"]).checkpoint()
    found = ways(checkpoint, torch.float32, CUDA, Pretended(free(GB), free(10)))
    assert [each.setting for each in found] == ["--device cpu"]
    assert advice(found).startswith("no more than 1 of the settings would fit: --device cpu: ")
    assert advice([]).startswith("no setting would fit, down to a Q2_K build")
    three = ways(checkpoint, torch.float64, CPU, Pretended(free(GB), free(GB)))
    assert [each.setting for each in three] == ["--device cuda", "without --dtype", "--dtype bfloat16"]
    assert advice(three).startswith("these would fit: --device cuda: ")


def test_a_refusal_comes_before_anything_is_read(
    builds: dict[str, Path],
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(system.GIVEN, "0.0001")
    monkeypatch.setattr("pumice.model.assembled", None)
    refused(command("run", builds["hf"], "What?"), "needs", "0.10 MB", "no setting")
    with pytest.raises(UserError, match="of memory"):
        pumice.load(builds["Q4_0"])
    printed = command("plan", builds["hf"])
    assert (printed.code, "no, and it will not be loaded" in printed.out) == (0, True)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_fills_the_memory(builds: dict[str, Path]) -> None:
    """As many conversations as fit, and no more."""
    for name in ("bfloat16", "Q4_0"):
        found = of(builds[name])
        least_ = found.needs(*smallest(found.config)).total
        for room in (least_, least_ + 10**6, least_ + 10**7, least_ + 10**8):
            planned = plan(builds[name], device="cpu", machine=Pretended(free(room)), probe=False)
            assert planned.verdict == "fits"
            taken = planned.text.total + planned.eyes.total + planned.work_bytes
            if not planned.context:
                assert taken + planned.position_bytes > room
                continue
            one = planned.context * planned.position_bytes
            assert taken + planned.conversations * one <= room < taken + (planned.conversations + 1) * one
            if planned.context < planned.positions:
                assert planned.conversations == 1
                assert taken + one + planned.position_bytes > room
        assert planned.context == planned.positions == 8192
        assert planned.gpu_layers is None


def test_a_tight_plan_counts_on_pages_giving_way(builds: dict[str, Path]) -> None:
    needs = of(builds["bfloat16"]).needs(*smallest(of(builds["bfloat16"]).config))
    planned = plan(builds["bfloat16"], machine=Pretended(Memory(10**12, needs.total - 1)), device="cpu", probe=False)
    assert planned.verdict == "tight"
    room = needs.total - 1 - planned.text.own - planned.eyes.own - planned.work_bytes
    assert planned.context == min(8192, room // planned.position_bytes)
    assert room > needs.mapped
    hopeless = plan(builds["bfloat16"], machine=Pretended(free(10)), device="cpu", probe=False)
    assert (hopeless.verdict, hopeless.context, hopeless.conversations, hopeless.ways) == ("no", 0, 0, ())
    unknown = plan(builds["bfloat16"], machine=Pretended(None), device="cpu", probe=False)
    assert (unknown.verdict, unknown.memory, unknown.context) == (None, None, 8192)


def test_how_many_blocks_fit_on_a_gpu(builds: dict[str, Path]) -> None:
    there = of(builds["hf"], device=CUDA)
    layer = there.layers[0] + 8192 * there.position_bytes // 3
    rest = there.weights.total - sum(there.layers)
    counts = []
    for blocks in (-1, 0, 1, 2, 3, 4):
        work = plan(builds["hf"], device="cpu", machine=Pretended(None), probe=False).work_bytes
        memory = free(rest + work + there.widest + blocks * layer)
        planned = plan(builds["hf"], device="cpu", machine=Pretended(free(10**12), memory), probe=False)
        counts.append(planned.gpu_layers)
    assert counts == [0, 0, 1, 2, 3, 3]


def test_layers_for_a_gpu_that_does_not_hold_all(builds: dict[str, Path]) -> None:
    """As many as fit beside a question about the smallest picture, on both sides; the two sides are the whole."""
    checkpoint = Source(builds["hf"]).checkpoint()
    question, whole = smallest(checkpoint.config), of(builds["hf"], device=CUDA)
    for layers in (1, 2, 3):
        place = Placement.of_layers(CUDA, 3, layers)
        there, here = (
            footprint(checkpoint.tensors, checkpoint.config, None, device, place) for device in place.devices
        )
        assert there.weights.total + here.weights.total == whole.weights.total
        assert there.position_bytes + here.position_bytes == whole.position_bytes
        assert here.eyes.total == 0
        assert sum(size > 0 for size in there.layers) == layers - 1
        needs = [each.needs(*question).total for each in (here, there)]
        machine = Pretended(free(needs[0]), free(needs[1]))
        assert gpu_layers(checkpoint, None, CUDA, machine) == layers
        check(checkpoint, None, place, machine)
        for short in (Pretended(free(needs[0] - 1), free(needs[1])), Pretended(free(needs[0]), free(needs[1] - 1))):
            assert gpu_layers(checkpoint, None, CUDA, short) != layers
        hopeless = there.needs(*least(checkpoint.config)).total - 1
        with pytest.raises(UserError, match="the device cuda has"):
            check(checkpoint, None, place, Pretended(free(10**12), free(hopeless)))
    first = ways(checkpoint, None, CUDA, Pretended(free(10**12), free(needs[1])))[0]
    assert (first.setting, first.bytes) == ("--gpu-layers 3", needs[1])


def test_blocks_in_a_gpu_are_computed_in_half_precision(builds: dict[str, Path]) -> None:
    assert of(builds["Q4_0"], device=CUDA).dtype == torch.float16
    assert of(builds["Q4_0"]).dtype == torch.float32
    assert of(builds["Q4_0"], torch.bfloat16, CUDA).dtype == torch.bfloat16
    assert of(builds["bfloat16"], device=CUDA).dtype == torch.bfloat16


def test_a_plan_as_json(builds: dict[str, Path], command: Command) -> None:  # noqa: F811
    done = command("plan", builds["Q4_0"], "--json", "--device", "cpu")
    facts = json.loads(done.out)
    assert facts.keys() == {each.name for each in dataclasses.fields(Plan)}
    found = of(builds["Q4_0"])
    assert facts["text"] == {"mapped": found.text.mapped, "own": found.text.own}
    assert facts["pace"].keys() == {each.name for each in dataclasses.fields(pace.Pace)}
    assert all(value > 0 for value in facts["pace"].values())
    assert facts["dtype"] == "float32"
    text = command("plan", builds["Q4_0"], "--device", "cpu").out
    for line in ("language model", "eyes", "a picture", "does it fit        yes", "a prompt", "a tile"):
        assert line in text
    refused(command("plan", builds["Q4_0"], "--dtype", "int7"), "int7")


# --- the probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf", "float16", "original", "F16", "Q8_0", "q8-eyes"])
def test_the_probe_runs_on_every_kind_of_file(builds: dict[str, Path], name: str) -> None:
    checkpoint = Source(builds[name]).checkpoint()
    found = footprint(checkpoint.tensors, checkpoint.config, None, CPU)
    measured = pace.measure(checkpoint, found, None, CPU, context=100)
    assert all(0 < value < math.inf for value in dataclasses.asdict(measured).values())
    assert measured.decode_last < measured.decode


def test_a_slice_has_the_weights_that_the_model_would_have(builds: dict[str, Path]) -> None:
    """Same shapes, formats and types, block by block; no two matrices share memory."""
    for name in ("bfloat16", "Q4_K_M"):
        checkpoint = Source(builds[name]).checkpoint()
        part = pace._slice(checkpoint, [2], None, CPU)
        whole = dict(tensors(load_from(Source(builds[name]), device="cpu")))
        seen = dict(tensors(part))
        for path, each in seen.items():
            origin = path.replace("language_model.layers.0", "language_model.layers.2")
            assert (each.shape, each.dtype) == (whole[origin].shape, whole[origin].dtype), path
        assert sum(path.startswith("language_model.layers") for path in seen) * 3 == sum(
            path.startswith("language_model.layers") for path in whole
        )
        places = sorted((each.data_ptr(), each.nbytes) for path, each in seen.items() if path != pace.TABLE)
        assert all(at + size <= behind for (at, size), (behind, _) in itertools.pairwise(places))


def test_a_slice_is_multiplied_up(builds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-worked: blocks of 100 bytes, of which one of four is probed, and a head of 50."""
    checkpoint = Source(builds["hf"]).checkpoint()
    found = dataclasses.replace(of(builds["hf"]), layers=(100, 100, 100, 100), position_bytes=10)
    timings = pumice.load(builds["hf"], device="cpu").ask("a", sampling=pumice.Sampling(max_tokens=1)).timings
    prompt = dataclasses.replace(timings, prefill_s=2.5, decode_s=0.0, decoded_tokens=0)
    decode = dataclasses.replace(timings, prefill_s=9.0, decode_s=3.0, decoded_tokens=2)
    answers = [pumice.Answer("", (), "length", 80, 0, (), each) for each in (prompt, decode)]
    monkeypatch.setattr(pace, "_asked", lambda model: answers)
    monkeypatch.setattr(pace, "_layers", lambda found: [1])
    monkeypatch.setattr(pace, "_slice", lambda *anything: None)
    monkeypatch.setattr(pace, "_tile_s", lambda *anything: 7.0)
    monkeypatch.setattr(pace, "_read_bytes_per_s", lambda device: 900.0)
    monkeypatch.setattr(pace, "_head_bytes", lambda *anything: 50)
    measured = pace.measure(checkpoint, found, None, CPU, context=45)
    # A step of the slice takes 1.5 s for 150 bytes; the model's has 450.
    assert measured.decode == pytest.approx(1 / 4.5)
    assert measured.decode_limit == 2.0
    assert measured.decode_last == pytest.approx(1 / (4.5 + 0.5))
    # Of 2.5 s for the prompt the head takes 0.5; four blocks take 8.
    assert measured.prefill == pytest.approx(80 / 8.5)
    assert measured.tile_s == 7.0


@pytest.mark.parametrize("name", ["hf", "Q4_0"])
def test_a_prompt_needs_little_of_the_last_block(builds: dict[str, Path], name: str) -> None:
    """With weights in blocks keys and values alone: 2 heads of 16, beside 4 of queries and an MLP that is 112 wide."""
    quantised = name == "Q4_0"
    assert pace._last_block(of(builds[name]), CPU) == (64 / (64 + 128 + 336) if quantised else 1.0)
    assert pace._last_block(of(builds[name]), CUDA) == 1.0
    assert pace._last_block(of(builds[name], torch.float16), CPU) == 1.0


def test_the_blocks_that_are_probed(builds: dict[str, Path]) -> None:
    found = of(builds["hf"])
    assert pace._layers(found) == [0, 1, 2]
    large = dataclasses.replace(found, layers=(10**9,) * 32, text=Share(33 * 10**9))
    assert pace._layers(large) == [8, 24]
    middling = dataclasses.replace(found, layers=(25 * 10**6,) * 22, text=Share(640 * 10**6))
    assert pace._layers(middling) == [1, 4, 7, 11, 14, 17, 20]
