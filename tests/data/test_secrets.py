"""Credentials never leave: masked in errors, on the terminal and in the log, refused in a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from instil.errors import DataError, Problem, UsageError, masked
from instil.resume import logged

# Made up, each of the form that its service gives out; what must be gone is the part after the bar.
SECRETS = [
    "hf_|AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "sk-|1234567890abcdefghijklmnop", "sk-proj-|Ab12Cd34Ef56Gh78Ij90Kl12",
    "sk-ant-api03-|Ab12Cd34Ef56Gh78-Ij90_Kl12", "ghp_|16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_|11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz", "glpat-|abcdefghij0123456789", "xoxb-|123456789012-abcdefghijkl",
    "AKIA|IOSFODNN7EXAMPLE", "https://|me:pa55word@host/x.jsonl", "postgres://|admin:hunter2@db",
    "https://host/x?token=|5ebe2294ecd0e0f0", "https://host/x?a=1&api_key=|5ebe2294", "https://|:pa55word@host/x",
]  # fmt: skip
PLAIN = [
    "hf_dataset/train.jsonl", "sk-learn-classification-2024.jsonl", "desk-1234567890abcdefghij", "data/hf_x.jsonl",
    "https://host/x.jsonl", "me@host.org", "12:30:45", "ghp_short", "org/name@main", "a: b@c", "https://host/a:b/@c",
    "a.jsonl:12: messages[0]: x@y", "tokens=5", "pack.tokens=512",
]  # fmt: skip


def parts(secret: str) -> tuple[str, str]:
    """The whole text, and what of it must not be seen."""
    kept, _, hidden = secret.partition("|")
    return kept + hidden, hidden.partition("@")[0]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_credential_is_masked(secret: str) -> None:
    """Alone, in a sentence, in quotes, twice; and a text that is masked stays as it is."""
    text, hidden = parts(secret)
    for around in ("{}", "see {} there", "'{}'", "key={}", "{} {}", "(x: {}; y)"):
        shown = masked(around.format(text, text))
        assert hidden not in shown
        assert "***" in shown
        assert masked(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_are_left_alone(text: str) -> None:
    """Names of files, addresses without a password, settings."""
    assert masked(text) == text


@pytest.mark.parametrize("secret", SECRETS)
def test_errors_terminal_and_log_mask(secret: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As place, as value and as remedy of a problem; as a line to people, as a result, and in log.txt."""
    from instil.cli.console import put, say

    text, hidden = parts(secret)
    error = DataError(Problem(text, f"is {text!r}", f"not {text}"))
    assert hidden not in "".join([*error.lines(), str(error)])
    say(f"line {text}")
    put(f"result {text}")
    said: list[str] = []
    logged(tmp_path / "log.txt", said.append)(f"logged {text}")
    shown = capsys.readouterr()
    for seen in (shown.err, shown.out, (tmp_path / "log.txt").read_text()):
        assert hidden not in seen
        assert "***" in seen


def test_a_log_without_masking_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: with a masking that does nothing, the secret is in the log, and the check above would see it."""
    monkeypatch.setattr("instil.resume.masked", lambda text: text)
    text, hidden = parts(SECRETS[0])
    logged(tmp_path / "log.txt", lambda line: None)(text)
    assert hidden in (tmp_path / "log.txt").read_text()


PLACES = [
    "model={}", "template={}", "data.train=[{}]", "data.train=[{{path: a.jsonl, mapping: {{prompt: '{}', completion: b}}}}]",
    "data.heldout={}", "data.mapping={{prompt: '{}', completion: b}}", "chat.template_args={{a: [{{b: '{}'}}]}}",
    "chat.template_args={{'{}': 1}}", "chat.terminator='{}'", "adapter.targets=['{}']", "run.dir={}", "run.device={}",
    "token={}", "train.lr={}",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS[:6] + SECRETS[9:12])
@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_with_a_credential_is_refused_and_does_not_show_it(
    place: str, secret: str, tmp_path: Path
) -> None:
    """In every key that takes text, in keys that there are not, on the command line and in a file: exit 2, masked."""
    from instil.config import load_config

    text, hidden = parts(secret)
    given: dict[str, Any] = {"model": "m", "data.train": ["a.jsonl"]}
    setting = place.format(text)
    key = setting.partition("=")[0]
    with pytest.raises(UsageError) as refused:
        load_config(None, [setting], {k: v for k, v in given.items() if k != key})
    lines = refused.value.lines()
    assert hidden not in "\n".join(lines)
    line = next(line for line in lines if "looks like a credential" in line)
    assert "***" in line
    assert line.endswith("set HF_TOKEN in the environment, or keep it in a credential store (`hf auth login`)")
    file = tmp_path / "c.yaml"
    section, _, name = key.rpartition(".")
    value = setting.partition("=")[2]
    file.write_text(f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n")
    with pytest.raises(UsageError) as refused:
        load_config(file)
    shown = [line for line in refused.value.lines() if "looks like a credential" in line]
    assert shown
    assert shown[0].startswith(f"{file}:{2 if section else 1}: {key}: ")
    assert hidden not in "\n".join(refused.value.lines())


WHERE = [("--model", "{}"), ("--template", "{}"), ("--heldout", "{}"), ("run.dir={}/runs",), ("{}.yaml",)]


@pytest.mark.parametrize("words", WHERE)
def test_no_command_writes_or_shows_a_credential(words: tuple[str, ...], place: Path) -> None:
    """`train` with a token where another value belongs: exit 2, the value masked, and no file of it anywhere."""
    text, hidden = parts(SECRETS[0])
    before = tiny.tree(place)
    given = [word.format(text) for word in words]
    base = [] if words[0] == "--model" else ["--model", place / "m"]
    said = tiny.command("train", *base, "--data", place / "a.jsonl", *given)
    assert said.code == 2
    assert hidden not in "".join([said.out, *said.err])
    assert any("hf_***" in line for line in said.err)
    assert tiny.tree(place) == before


def test_a_token_in_the_environment_is_in_no_file_of_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN is the way that the errors name: a run with it set trains, and none of its files holds it."""
    text, hidden = parts(SECRETS[0])
    monkeypatch.setenv("HF_TOKEN", text)
    monkeypatch.setenv("OPENAI_API_KEY", parts(SECRETS[1])[0])
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err

    def holding() -> set[str]:
        return {f.name for f in (place / "runs").rglob("*") if f.is_file() and hidden.encode() in f.read_bytes()}

    assert {"config.yaml", "manifest.json", "log.txt"} <= {file.name for file in (place / "runs" / "x").iterdir()}
    assert holding() == set()
    (place / "runs" / "x" / "planted.txt").write_text(text)
    assert holding() == {"planted.txt"}
