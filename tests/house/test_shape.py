"""The shape of the house: empty inner __init__, first lines, README tree, public names, the budget of keys."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import instil
from instil.cli.console import is_setting
from instil.config import Config, flat, keys, load_config
from instil.data.spec import spec_problems
from instil.prepare import sources

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "instil"
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
VAGUE = {"utils", "common", "helpers", "base", "misc"}


def first_line(file: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0].rstrip(".")


def modules() -> list[Path]:
    return [f for f in sorted(SOURCE.rglob("*.py")) if f.name != "__init__.py"]


def readme_tree() -> dict[str, str]:
    """path -> what the README says of it, from the block that starts with src/instil/."""
    lines = README.split("```")
    block = next(part for part in lines if part.startswith("\nsrc/instil/") or part.startswith("text\nsrc/instil/"))
    found, folder = {}, ""
    for line in block.splitlines():
        name, _, text = line.strip().partition("  ")
        if name.endswith("/"):
            folder = "" if name == "src/instil/" else name
        elif name.endswith(".py"):
            found[(folder if line.startswith("    ") else "") + name] = text.strip()
    return found


def test_inner_inits_are_empty() -> None:
    """Nothing hides in a stage's __init__."""
    for file in SOURCE.glob("*/__init__.py"):
        assert file.read_text() == "", file


def test_every_module_says_its_job_first() -> None:
    """One file, one job, said in its first line."""
    for file in modules():
        assert 15 <= len(first_line(file)) <= 120, f"{file}: {first_line(file)!r}"
        assert file.stem not in VAGUE


def test_the_readme_tree_is_true() -> None:
    """The README's tree lists every module with exactly its first line."""
    assert readme_tree() == {str(f.relative_to(SOURCE)): first_line(f) for f in modules()}


def test_at_most_sixty_keys_each_with_a_description() -> None:
    """Knobs are budgeted, and each says what it is."""
    found = list(keys())
    assert len(found) <= 60
    assert len(set(found)) == len(found)

    def described(section: type) -> None:
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                described(kind)
            else:
                assert field.description, name

    described(Config)


def test_the_configuration_page_lists_every_key() -> None:
    """docs/configuration.md has a row for each key and for nothing else."""
    rows = [line.split("`")[1] for line in CONFIGURATION.splitlines() if line.startswith("| `")]
    assert rows == list(keys())


def test_the_configuration_page_has_the_defaults() -> None:
    """The default in each row is the one that the code has."""
    from ruamel.yaml import YAML

    defaults = flat(load_config(None, given={"model": "m", "data.train": ["a"]}).model_dump())
    for line in CONFIGURATION.splitlines():
        if line.startswith("| `"):
            key, default = (cell.strip() for cell in line.split("|")[1:3])
            if default == "(needed)":
                continue
            said = YAML(typ="safe", pure=True).load(default.strip("`"))
            assert said == defaults[key.strip("`")], key


def test_the_examples_of_the_configuration_page_work() -> None:
    """Every YAML block is a configuration, its mappings are ones, and every command line's settings are settings."""
    blocks = CONFIGURATION.split("```")[1::2]
    settings, mappings = [], 0
    for block in blocks:
        kind, _, text = block.partition("\n")
        if kind == "yaml":
            config = load_config(None, given=_tree(text))
            problems = [problem for spec in sources(config) for problem in spec_problems(spec)]
            mappings += any(spec.mapping for spec in sources(config))
            assert problems == []
        else:
            words = [word for line in text.splitlines() for word in shlex.split(line, comments=True)]
            settings += [word for word in words if is_setting(word)]
    for word in settings:
        load_config(None, [word], {"model": "m", "data.train": ["a"]})
    assert (mappings, len(settings)) == (4, 4)


def _tree(text: str) -> dict[str, object]:
    """A block's sections as given keys, with what every configuration needs."""
    from ruamel.yaml import YAML

    return {"model": "m", "data": {"train": ["a"]}} | YAML(typ="safe", pure=True).load(text)


def test_the_public_names_exist_and_are_few() -> None:
    """About fifteen names, each importable from the root and documented."""
    assert len(instil.__all__) <= 20
    for name in instil.__all__:
        assert getattr(instil, name).__doc__, name


def test_help_is_fast() -> None:
    """`instil --help` imports nothing heavy (best of three, with room for a busy machine; measured 0.17 s alone)."""
    best = min(_seconds("--help") for _ in range(3))
    assert best < 1.5


def _seconds(*arguments: str) -> float:
    start = time.monotonic()
    code = "from instil.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return time.monotonic() - start


def test_help_imports_nothing_heavy() -> None:
    """What makes it fast: not even numpy, pydantic or pyarrow is loaded for --help."""
    code = (
        "import sys\nfrom instil.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'numpy', 'pydantic', 'pyarrow', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    "name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", ".ci/run"]
)
def test_the_project_files_are_there(name: str) -> None:
    """What a newcomer looks for."""
    assert (ROOT / name).stat().st_size > 0
