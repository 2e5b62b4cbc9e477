"""The law of the house: who imports whom, how long things are, which names are public, that the README is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "pumice"
FILES = sorted(PACKAGE.rglob("*.py"))

ROWS = {
    "errors": 0,
    "config": 1, "image": 1, "picture": 1, "prompt": 1, "chat_template": 1, "tokenizer": 1, "decoding": 1,
    "tokenizer_json": 1, "sentencepiece": 1, "special_tokens": 1,
    "go_template": 1, "ollama_prompt": 1, "ollama_tools": 1, "durations": 1, "options": 1, "modelfile": 1,
    "ops": 2, "quant": 2, "packing": 2,
    "network": 3, "checkpoints": 3, "store": 3,
    "engine": 4, "room": 4,
    "question": 5, "dialogue": 5, "answer": 5, "classification": 5, "conversation": 5, "model": 5,
    "sampling_options": 5, "source": 5, "embedding": 5, "sentences": 5,
    "train": 6, "tasks": 6, "creating": 6, "conversion": 6, "server": 6,
    "cli": 7,
}  # fmt: skip
WITHIN_A_ROW = {
    ("image", "config"), ("image", "picture"), ("picture", "config"), ("decoding", "sentencepiece"),
    ("prompt", "config"), ("tokenizer", "prompt"), ("tokenizer", "decoding"),
    ("tokenizer", "sentencepiece"), ("tokenizer", "special_tokens"), ("tokenizer", "tokenizer_json"),
    ("tokenizer_json", "decoding"), ("store", "checkpoints"),
    ("model", "question"), ("model", "dialogue"), ("model", "source"), ("model", "sampling_options"),
    ("model", "embedding"), ("sentences", "embedding"), ("sentences", "model"), ("server", "creating"),
    ("source", "dialogue"), ("question", "dialogue"),
    ("model", "answer"), ("model", "classification"), ("model", "conversation"),
    ("answer", "question"), ("conversation", "answer"), ("conversation", "question"), ("classification", "question"),
    ("ollama_prompt", "prompt"), ("ollama_prompt", "go_template"), ("ollama_prompt", "ollama_tools"),
    ("ollama_tools", "go_template"), ("durations", "go_template"), ("options", "go_template"), ("modelfile", "options"),
    ("ops", "quant"), ("ops", "packing"), ("packing", "quant"),
}  # fmt: skip
"""Imports inside one row that are allowed; a folder's own files are always free to import each other."""
HOMES = {
    "PIL": {"image", "picture"}, "pillow_heif": {"picture"}, "tokenizers": {"tokenizer", "tokenizer_json"},
    "safetensors": {"checkpoints"},
    "httpx2": {"store"}, "huggingface_hub": {"store"}, "llguidance": {"engine"}, "pydantic": set(), "jsonschema": set(),
    "typer": {"cli"}, "rich": {"cli"}, "transformers": set(), "ctypes": {"ops"}, "triton": {"ops"}, "ray": {"server"},
    "sentence_transformers": {"sentences"},
    "fastapi": {"server"}, "starlette": {"server"}, "uvicorn": {"server"}, "prometheus_client": {"server"},
}  # fmt: skip
"""Third-party names and the only rooms that may import them."""
WIDEST = {("model", "load"): 8, ("model", "ask"): 7, ("model", "stream"): 7}
"""Functions with more than six parameters: what users choose, each by its name, when they load a model and ask it."""
WITHOUT_TORCH = {
    "config",
    "image",
    "picture",
    "prompt",
    "chat_template",
    "tokenizer",
    "tokenizer_json",
    "decoding",
    "sentencepiece",
    "special_tokens",
    "go_template",
    "ollama_prompt",
    "ollama_tools",
    "durations",
    "options",
    "modelfile",
    "errors",
    "creating",
    "cli",
    "store",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_rows_only(path: Path) -> None:
    mine = room(path)
    if mine in ("__init__", "__main__"):
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("pumice.")} & ROWS.keys()
    wrong = [other for other in used - {mine} if ROWS[other] >= ROWS[mine] and (mine, other) not in WITHIN_A_ROW]
    assert not wrong, f"{mine} (row {ROWS[mine]}) imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_names_have_one_home(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    strays = [name for name in roots & HOMES.keys() if room(path) not in HOMES[name]]
    assert not strays, f"{path} imports {strays}"
    if room(path) in WITHOUT_TORCH:
        assert "torch" not in roots


def test_sizes() -> None:
    long_files = [f"{path.relative_to(ROOT)}" for path in FILES if len(path.read_text().splitlines()) > 450]
    assert not long_files
    long_functions = [
        f"{where(path, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in FILES
        for node in functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert not long_functions


def test_signatures() -> None:
    wrong = []
    for path in FILES:
        # The command line's parameters are its flags: one a flag is what typer reads.
        if room(path) == "cli":
            continue
        for node in functions(path):
            if "triton.jit" in map(ast.unparse, node.decorator_list):
                continue  # a kernel takes each pointer and stride by itself
            spec = node.args
            named = [each.arg for each in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
            count = len([name for name in named if name not in ("self", "cls")])
            most = WIDEST.get((room(path), node.name), 6)
            if count > most or spec.kwarg is not None:
                wrong.append(f"{where(path, node.lineno)} {node.name}: {count} parameters")
    assert not wrong


def test_no_guessing() -> None:
    """No attribute with a default, no bare or blanket except, no substring of a path (rules 5 and 6)."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                wrong.append(where(path, node.lineno))
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "getattr"
                and len(node.args) == 3
            ):
                wrong.append(where(path, node.lineno))
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                wrong.append(where(path, node.lineno))
    assert not wrong


def test_public_names() -> None:
    import pumice

    assert sorted(pumice.__all__) == [
        "Answer", "Calibration", "Card", "Chat", "Classification", "Exchange", "Form", "Labelling", "Limits", "Model",
        "Question", "Sampling", "UserError", "calibrate", "convert", "load", "save_values", "verify",
    ]  # fmt: skip
    for name in pumice.__all__:
        assert getattr(pumice, name).__doc__, name


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "PIL", "tokenizers")
    code = f"import sys, pumice, pumice.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_readme_is_short_and_its_python_runs(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_commands_run() -> None:
    """Every `pumice …` line of the README that names the bundled model or nothing at all."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"```(?:sh|console)\n(.*?)```", text, flags=re.S) for line in block.splitlines()
    ]
    commands = [line.split(" #")[0].strip() for line in lines if line.startswith("pumice ") and "pebble" in line]
    assert commands
    for command in commands:
        done = subprocess.run(
            f"{sys.executable} -m {command}",
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_nothing_names_another_place() -> None:
    """Links in the documents lead to files that exist."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "pebble").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_options_that_errors_recommend_exist() -> None:
    """A hint sends people to the command line: what it names must be there."""
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    golden = ROOT / "tests" / "golden"
    ours = set(option.findall((golden / "cli_help.txt").read_text(encoding="utf-8")))
    theirs = set(option.findall((golden / "llava_cli_help.txt").read_text(encoding="utf-8")))
    for path in FILES:
        if path.parent.name != "train":  # `python -m pumice.train` has options of its own
            known = theirs if path.stem in ("llava_cli", "llava_flags") else ours
            named = {
                name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in _named(node, option)
            }
            assert named <= known, path


def _named(node: ast.AST, option: re.Pattern[str]) -> list[str]:
    return option.findall(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
