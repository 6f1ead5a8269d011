"""Imports go downwards only, never in a circle, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "instil"

LAYERS = {
    "errors": 0, "types": 0, "files": 0, "data": 1, "chat": 1, "curate": 2, "pack": 2, "model": 3, "train": 4, "evaluate": 5,
    "report": 6, "config": 7, "yamltext": 7, "folder": 7, "prepare": 7, "account": 7, "audit": 7, "workers": 7, "resolve": 7,
    "plan": 7, "planned": 7, "costs": 7, "footprint": 7, "pace": 7, "forecast": 7,
    "explain": 7, "record": 7, "measure": 7, "compiling": 7, "difference": 7,
    "resume": 7, "fork": 7, "replay": 7, "verify": 7, "run": 7,
    "cli": 8, "studio": 8,
}  # fmt: skip
ONLY_ZERO = {"data", "chat", "model", "report"}  # these import layer 0 and themselves
NO_TORCH = {"errors", "types", "files", "data", "chat", "curate", "pack", "report"}
HEAVY = {"torch", "transformers", "peft", "accelerate"}
OPTIONAL = {"gguf": "model/gguf.py"}  # optional library: the one file that may import it


def stage(file: Path) -> str:
    """The first name under instil/: `data` for data/sources.py, `run` for run.py."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Every dotted module name that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def layer_faults(name: str, modules: set[str]) -> list[str]:
    """What `name`'s stage may not import among `modules`."""
    faults = []
    for module in modules:
        parts = module.split(".")
        if parts[0] == "instil" and len(parts) > 1 and parts[1] in LAYERS and parts[1] != name:
            upwards = LAYERS[parts[1]] > LAYERS[name]
            sideways = name in ONLY_ZERO and LAYERS[parts[1]] > 0
            if upwards or sideways:
                faults.append(f"{name} (layer {LAYERS[name]}) imports {module} (layer {LAYERS[parts[1]]})")
        if parts[0] in HEAVY and name in NO_TORCH:
            faults.append(f"{name} imports {module}")
    return faults


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_downwards(file: Path) -> None:
    """A stage imports lower layers only, and torch stays out of the layers that must start fast."""
    if file == SOURCE / "__init__.py":
        pytest.skip("the root re-exports lazily")
    assert layer_faults(stage(file), imported(ast.parse(file.read_text()))) == []


@pytest.mark.parametrize(("name", "line"), [
    ("data", "import instil.train.loop"), ("pack", "from instil.run import train"), ("chat", "import torch"),
    ("model", "from instil.pack.bins import plan_packs"), ("report", "from instil.model.locate import locate"),
])  # fmt: skip
def test_an_upward_import_is_caught(name: str, line: str) -> None:
    """The layer check fires on a planted fault."""
    assert layer_faults(name, imported(ast.parse(line)))


def test_every_stage_has_a_layer() -> None:
    """A new folder or root module must say where it belongs."""
    assert {stage(f) for f in files()} - {"__init__"} <= set(LAYERS)


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that can reach themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for child in graph.get(todo.pop(), ()):
                if child not in seen:
                    seen.add(child)
                    todo.append(child)
        return seen

    return sorted(name for name in graph if name in reach(name))


def top_level(tree: ast.Module) -> set[str]:
    """Imports outside functions and outside `if TYPE_CHECKING`."""
    body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return imported(ast.Module(body=body, type_ignores=[]))


def test_no_module_imports_itself_in_a_circle() -> None:
    """The import graph has no cycle."""
    names = {".".join(f.relative_to(SOURCE.parent).with_suffix("").parts): f for f in files()}
    graph = {name: top_level(ast.parse(f.read_text())) & set(names) for name, f in names.items()}
    assert cycles(graph) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_optional_imports_live_in_one_file() -> None:
    """An optional library is imported in one file only, and that file prints its install line."""
    for library, home in OPTIONAL.items():
        users = [
            str(f.relative_to(SOURCE)) for f in files()
            if any(m.split(".")[0] == library for m in imported(ast.parse(f.read_text())))
        ]  # fmt: skip
        assert users == [home]
        assert f"pip install 'instil[{library}]'" in (SOURCE / home).read_text()


def test_layers_without_torch_start_without_it() -> None:
    """Importing what check and inspect need loads neither torch nor transformers."""
    code = (
        "import sys, instil.prepare, instil.report.page, instil.report.tokens, instil.cli.main;"
        f"print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle_eval_or_shell() -> None:
    """Nothing in the package unpickles, evaluates text, or starts a shell."""
    forbidden_modules = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
    for file in files():
        tree = ast.parse(file.read_text())
        assert not {m.split(".")[0] for m in imported(tree)} & forbidden_modules, file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "os.system", "torch.load", "subprocess.run"}, f"{file}: {name}"
                assert not any(k.arg in ("allow_pickle", "shell") for k in node.keywords), f"{file}: {name}"
