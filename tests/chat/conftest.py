"""Fixtures of the chat tests: small model folders, the real templates, and transformers as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_samples import CONTROL, SHARED, SPECIAL, TEMPLATES, train_tokenizer

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_templates() -> Path:
    """The folder of real templates, where this machine has it."""
    folder = SHARED / "chat_templates"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the real chat templates are not part of the project")
    return folder


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Write a model folder: tokenizer.json, tokenizer_config.json with `config`, and chat_template.jinja."""

    def make(template: str | None = None, control: tuple[str, ...] = tuple(CONTROL), **config: object) -> Path:
        folder = tmp_path_factory.mktemp("model")
        train_tokenizer(list(control)).save(str(folder / "tokenizer.json"))
        named = {key: value for key, value in (SPECIAL | config).items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def oracle() -> Callable[[Path], object]:
    """transformers' own tokenizer of a folder."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained


@pytest.fixture(scope="session", params=sorted(TEMPLATES))
def folder(request: pytest.FixtureRequest, make_folder: MakeFolder) -> Path:
    """A model folder for each of our own templates."""
    return make_folder(TEMPLATES[request.param])


@pytest.fixture(scope="session")
def chatml(make_folder: MakeFolder) -> Path:
    """A model folder with a ChatML template and a default system message."""
    return make_folder(TEMPLATES["chatml"])
