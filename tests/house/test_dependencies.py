"""What the package imports is what pyproject.toml declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def plain(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(sources: list[str], declared: set[str]) -> set[str]:
    """Libraries that the sources import and that no declared distribution brings, but another one that needs them."""
    modules = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    brought = packages_distributions()
    others = modules - set(sys.stdlib_module_names) - {"instil"}
    return {name for name in others if not declared & {plain(each) for each in brought.get(name, [name])}}


def test_every_library_that_is_imported_is_declared() -> None:
    """A library that only another one brings would be gone with it; the check fires on one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for more in project["optional-dependencies"].values() for each in more)]
    declared = {plain(re.split(r"[<>=~!\[; ]", each)[0]) for each in wanted}
    sources = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "src").rglob("*.py"))]
    assert undeclared(sources, declared) == set()
    assert undeclared(["import yaml.nodes", "from markupsafe import Markup"], declared) == {"yaml"}
