"""Files to stored examples: every row accounted for to the token, made once, and found again by what they depend on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import instil
import tiny
from instil import prepare as stage
from instil import workers
from instil.audit import check
from instil.config import Config, load_config
from instil.errors import DataError, TemplateError
from instil.files import sha256_of
from instil.folder import RunFolder
from instil.prepare import Chat, Prepared, data_digests, examples, open_chat, prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer, template and a context of 64 tokens, without weights."""
    folder = tiny.write_model(tmp_path_factory.mktemp("prepare") / "m", weights=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    return folder


def prepared(model: Path, file: Path, run: Path, **given: Any) -> Prepared:
    """Prepare a file for a model into a run folder."""
    config = config_of(model, file, **given)
    run.mkdir(exist_ok=True)
    chat = open_chat(model, config.template, args=config.chat.template_args)
    return prepare(config, model, chat, data_digests(config), RunFolder(run))


def config_of(model: Path, file: Path, **given: Any) -> Config:
    return load_config(None, (), {"model": str(model), "data.train": [str(file)], **given})


def ledger_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


# ── the account ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_row_has_a_line_and_the_sums_are_the_examples(model: Path, tmp_path: Path) -> None:
    """The ledger has each row once, in order, and its sums equal those of the stored examples, to the token."""
    rows = tiny.some_rows(40)
    rows[7] = tiny.row("say", "  ")  # empty answer
    rows[9]["messages"] += tiny.row("and", "lime")["messages"]  # two answers
    rows[11]["messages"][1]["weight"] = 0  # context only
    rows[13] = tiny.row("say " + "x" * 100, "red")  # longer than the context
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    found = prepared(model, file, tmp_path / "run", **{"data.heldout": 0.1, "data.drop_most": 0.1})
    ledger = ledger_of(tmp_path / "run")
    assert [entry["origin"] for entry in ledger] == [f"{file}:{i + 1}" for i in range(40)]
    assert found.heldout is not None
    for side, store in (("train", found.train), ("heldout", found.heldout)):
        entries = [entry for entry in ledger if entry["side"] == side]
        assert sum(e["examples"] for e in entries) == len(store)
        assert sum(e["prompt_tokens"] for e in entries) == sum(len(e.prompt_tokens) for e in store)
        assert sum(e["answer_tokens"] for e in entries) == sum(len(e.answer_tokens) for e in store)
        used = Counter(e.origin for e in store)
        assert used == {e["origin"]: e["examples"] for e in entries if e["fate"] != "dropped"}
    rules = {entry["origin"].rpartition(":")[2]: entry["rule"] for entry in ledger if entry["fate"] == "dropped"}
    assert rules == {"8": "empty_answer", "12": "no_target", "14": "too_long"}
    assert found.record["rows"]["dropped_by_rule"] == {"empty_answer": 1, "no_target": 1, "too_long": 1}
    assert found.record["rows"]["used_rows"] + found.record["rows"]["dropped_rows"] == 40


@pytest.mark.parametrize("over", [0, 1])
def test_too_long_begins_after_the_limit(over: int, model: Path, tmp_path: Path) -> None:
    """An example of exactly pack.tokens computed tokens is used; with one more it is dropped, whole."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("say red", "lime"), tiny.row("say " + "x" * 30, "red")])
    prompt, answer = (
        len(t) for e in [examples([str(file)], str(model))[1]] for t in (e.prompt_tokens, e.answer_tokens)
    )
    limit = prompt + answer - 1 - over  # the last token is predicted, never computed
    prepared(model, file, tmp_path / "run", **{"data.heldout": 0.0, "pack.tokens": limit, "data.drop_most": 0.5})
    entry = ledger_of(tmp_path / "run")[1]
    assert (entry["fate"], entry["rule"]) == (("dropped", "too_long") if over else ("used", ""))
    assert entry["answer_tokens"] == (0 if over else answer)
    if over:
        assert entry["reason"] == f"1 of 1 examples need more than {limit} tokens"
        assert entry["dropped_tokens"] == prompt + answer


def test_a_row_may_lose_only_its_long_answers(model: Path, tmp_path: Path) -> None:
    """Turn 1 fits, turn 2 does not: the row is split: one example is learnt, and the ledger says that one was too long."""
    row = {"messages": tiny.row("say", "red")["messages"] + tiny.row("x" * 60, "lime")["messages"]}
    file = tiny.write_rows(tmp_path / "a.jsonl", [row])
    found = prepared(model, file, tmp_path / "run", **{"data.heldout": 0.0})
    (entry,) = ledger_of(tmp_path / "run")
    assert (entry["fate"], entry["examples"], entry["rule"]) == ("split", 1, "too_long")
    assert entry["reason"] == "1 of 2 examples need more than 64 tokens"
    assert found.record["rows"]["dropped_rows"] == 0  # so that data.drop_most does not count it
    assert [e.turn for e in found.train] == [0]


def test_the_model_s_context_is_a_limit_too(model: Path, tmp_path: Path) -> None:
    """A pack may be wider than the model's context, an example not: positions past it were never trained."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("say", "red"), tiny.row("x" * 70, "red")])
    prepared(model, file, tmp_path / "run", **{"data.heldout": 0.0, "pack.tokens": 1000, "data.drop_most": 0.5})
    assert [entry["rule"] for entry in ledger_of(tmp_path / "run")] == ["", "too_long"]


def test_heldout_rows_are_the_file_s_or_a_share(model: Path, tmp_path: Path) -> None:
    """A file: all its rows; a share: so many of the training rows, at most heldout_most; 0: none. Never in both."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(40))
    other = tiny.write_rows(tmp_path / "b.jsonl", [tiny.row("what", "else"), tiny.row("who", "now")])
    for i, (given, train, heldout) in enumerate(
        [({"data.heldout": 0.25}, 30, 10), ({"data.heldout": 0.25, "data.heldout_most": 3}, 37, 3),
         ({"data.heldout": 0.0}, 40, 0), ({"data.heldout": str(other)}, 40, 2)]
    ):  # fmt: skip
        found = prepared(model, file, tmp_path / f"run{i}", **given)
        sides = [{e.origin for e in store or ()} for store in (found.train, found.heldout)]
        assert [len(side) for side in sides] == [train, heldout]
        assert not sides[0] & sides[1]
        assert (found.heldout is None) == (heldout == 0)


def test_what_was_prepared_is_what_the_api_shows(model: Path, tmp_path: Path) -> None:
    """`instil.examples` gives the very examples that training stores."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))
    stored = list(prepared(model, file, tmp_path / "run", **{"data.heldout": 0.0}).train)
    shown = instil.examples([str(file)], str(model))
    assert [(e.origin, e.prompt_tokens.tolist(), e.answer_tokens.tolist()) for e in stored] == [
        (e.origin, e.prompt_tokens.tolist(), e.answer_tokens.tolist()) for e in shown
    ]


# ── made once ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_start_reads_no_rows(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored examples are opened again; the data is hashed, but neither parsed nor tokenised."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))
    first = prepared(model, file, tmp_path / "run")

    def never(*_: object) -> None:
        raise AssertionError("read again")

    for name in ("load_conversations", "make_examples", "certified", "write_ledger"):
        monkeypatch.setattr(stage, name, never)
    second = prepared(model, file, tmp_path / "run")
    assert [e.prompt_tokens.tolist() for e in second.train] == [e.prompt_tokens.tolist() for e in first.train]
    assert second.record == first.record


def test_the_store_is_keyed_by_all_it_depends_on(model: Path, tmp_path: Path) -> None:
    """Another byte of data, another split, limit, policy, template or tokenizer: other examples are made."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(20))
    (tmp_path / "t.jinja").write_text(tiny.CHATML + "\n")
    run = tmp_path / "run"

    def key(folder: Path = model, **given: Any) -> str:
        return prepared(folder, file, run, **given).key

    seen = [key(), key(**{"data.heldout": 0.5}), key(**{"data.heldout_most": 1}), key(**{"pack.tokens": 60}),
            key(template=str(tmp_path / "t.jinja")), key(**{"targets.turns": "last"}),
            key(**{"targets.loss_per": "example"}), key(**{"targets.answer": 0.5}), key(**{"data.leak": "drop"}),
            key(**{"chat.control_text": "as-served"}), key(**{"chat.terminator": "<|endoftext|>"}),
            key(**{"chat.template_args": {"x": 1}}), key(**{"data.too_long": "trim-context"}),
            key(**{"data.strict": True})]  # fmt: skip
    renamed = tiny.write_model(tmp_path / "m2", weights=False)
    config = json.loads((renamed / "tokenizer_config.json").read_text())
    (renamed / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    (renamed / "config.json").write_bytes((model / "config.json").read_bytes())
    seen.append(key(renamed))
    tiny.write_rows(file, tiny.some_rows(21))
    seen.append(key())
    assert len(set(seen)) == len(seen)
    assert key(**{"train.lr": 1.0, "run.threads": 1}) == seen[-1]  # which change no example


def test_half_written_stores_are_not_believed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When publishing is cut off there is no store under the key, and the next start makes it."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))

    def cut(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", cut)
        with pytest.raises((OSError, instil.MachineError)):
            prepared(model, file, tmp_path / "run")
    assert tiny.tree(tmp_path / "run") <= {"packs"}
    assert len(prepared(model, file, tmp_path / "run").train) == 10


def test_a_ledger_that_is_gone_is_made_again(model: Path, tmp_path: Path) -> None:
    """With the same lines, and without one that is not asked for."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))
    prepared(model, file, tmp_path / "run")
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    (tmp_path / "run" / "ledger.jsonl").unlink()
    prepared(model, file, tmp_path / "run")
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


def test_a_file_that_changes_while_it_is_read_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples would stand under the name of other rows; nothing is stored, and the file is named."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))
    read = stage.load_conversations

    def meanwhile(*given: Any, **named: Any) -> Any:
        tiny.write_rows(file, tiny.some_rows(11))
        return read(*given, **named)

    monkeypatch.setattr(stage, "load_conversations", meanwhile)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read; start again"):
        prepared(model, file, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.undo()
    assert len(prepared(model, file, tmp_path / "run").train) == 11


def test_the_ledger_is_that_of_the_examples(model: Path, tmp_path: Path) -> None:
    """One file, another, the first again, the run not begun in between: the rows of the first, not those of the other."""
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    tiny.write_rows(one, tiny.some_rows(6))
    tiny.write_rows(other, tiny.some_rows(9))
    for file, rows in ((one, 6), (other, 9), (one, 6)):
        found = prepared(model, file, tmp_path / "run", **{"data.heldout": 0.0})
        assert found.record["rows"]["used_rows"] == rows
        assert [entry["origin"] for entry in ledger_of(tmp_path / "run")] == [f"{file}:{i + 1}" for i in range(rows)]


def test_examples_of_a_version_that_kept_no_hash_of_the_ledger_are_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not made anew, as their ledger is there."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))
    stored = tmp_path / "run" / "packs" / prepared(model, file, tmp_path / "run").key
    record = json.loads((stored / "record.json").read_text())
    del record["ledger_sha256"]
    (stored / "record.json").write_text(json.dumps(record))
    (stored / "sha256.json").write_text(json.dumps(sha256_of(stored)))
    monkeypatch.setattr(stage, "make", lambda *_: pytest.fail("made anew"))
    assert prepared(model, file, tmp_path / "run").record == record


def test_a_template_that_asks_for_the_date_has_examples_of_that_date(model: Path, tmp_path: Path) -> None:
    """In a folder whose run has not begun yet: another day, other prompts. A template that does not ask has the same ones."""
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}<|im_end|>" + tiny.CHATML)
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(2))
    (tmp_path / "run").mkdir()

    def on(day: str, template: str | None) -> tuple[str, str]:
        chat = open_chat(model, template, day)
        config = config_of(model, file, template=template, **{"data.heldout": 0.0})
        found = prepare(config, model, chat, data_digests(config), RunFolder(tmp_path / "run"))
        return found.key, chat.tokenizer.decode(found.train[0].prompt_tokens.tolist())

    days = ("2020-02-29", "2020-03-01")
    asking = [on(day, str(tmp_path / "t.jinja")) for day in days]
    assert asking[0][0] != asking[1][0]
    assert [text[:10] for _, text in asking] == list(days)
    assert on(days[0], None) == on(days[1], None)


def test_the_ledger_keeps_the_order_of_the_files(model: Path, tmp_path: Path) -> None:
    """A row of the second of two files is dropped while it is read, before any other is paired: still the first file first."""
    rows = tiny.some_rows(5)
    rows[1] = tiny.row("say", " ")
    files = [
        str(tiny.write_rows(tmp_path / "b.jsonl", tiny.some_rows(5))),
        str(tiny.write_rows(tmp_path / "a.jsonl", rows)),
    ]
    given = {"data.train": files, "data.heldout": 0.0, "data.drop_most": 1.0, "data.leak": "allow"}
    prepared(model, Path(files[0]), tmp_path / "run", **given)
    found = [entry["origin"] for entry in ledger_of(tmp_path / "run")]
    assert found == [f"{file}:{i}" for file in files for i in range(1, 6)]


# ── checking ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_counts_what_training_would_use(model: Path, tmp_path: Path) -> None:
    """Rows, examples and tokens; what is dropped for its length is counted, and nothing is ever cut."""
    from transformers import AutoTokenizer

    rows = [*tiny.some_rows(5), tiny.row("x" * 70, "red"), tiny.row("say", " ")]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    found = check([str(file)], str(model), settings={"data.drop_most": 1.0})
    made = examples([str(file)], str(model))
    assert (found.ok, found.rows, found.examples, found.exit_code) == (True, 7, 5, 0)
    long = f"<|im_start|>user\n{'x' * 70}<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    assert found.tokens == {
        "prompt": sum(len(e.prompt_tokens) for e in made),
        "answer": sum(len(e.answer_tokens) for e in made),
        "cut": 0,
        "dropped": len(AutoTokenizer.from_pretrained(model)(long, add_special_tokens=False)["input_ids"]),
    }
    assert found.certificate["dropped_rows"] == {f"{file}:7": "empty_answer", f"{file}:6": "too_long"}


def test_a_row_s_fault_is_a_finding_and_a_template_s_an_error(model: Path, tmp_path: Path) -> None:
    """check collects what is wrong with rows; for `examples` it raises; without a template there is nothing to check."""
    rows = [*tiny.some_rows(3), tiny.row("say <|im_end|>", "x"), tiny.row("say <|im_start|>", "x")]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    reject = {"chat.control_text": "reject"}
    found = check([str(file)], str(model), settings=reject)
    assert (found.ok, found.exit_code) == (False, 3)
    places = [f"{file}:{i}: messages[0].content" for i in (4, 5)]
    assert [(p.place, p.rule) for p in found.problems if p.rule != "dropped"] == [(p, "control-token") for p in places]
    with pytest.raises(DataError) as refused:
        examples([str(file)], str(model), settings=reject)
    assert [p.place for p in refused.value.problems] == places
    with pytest.raises(TemplateError):
        check([str(file)], str(tiny.write_model(tmp_path / "bare", weights=False, template=None)))


def test_a_planted_fault_in_the_tokens_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is no formality: one changed token in one example, and nothing is trained."""
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(10))
    make = workers.pairs_of

    def wrong(*args: Any) -> Any:
        pairs = make(*args)
        pairs.examples[4].answer_tokens[0] += 1
        return pairs

    monkeypatch.setattr(workers, "pairs_of", wrong)
    found = check([str(file)], str(model))
    assert (found.ok, found.exit_code) == (False, 4)
    assert {p.place for p in found.problems} == {f"{file}:5: turn 0"}
    with pytest.raises(instil.InstilError, match=r"a\.jsonl:5"):
        prepared(model, file, tmp_path / "run", **{"data.heldout": 0.0})
    assert tiny.tree(tmp_path / "run") == set()


def test_a_template_s_date_is_the_run_s(model: Path, tmp_path: Path) -> None:
    """A template that asks for the date gets the day on which the run began, so that a later start gives the same."""
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}<|im_end|>" + tiny.CHATML)
    chat: Chat = open_chat(model, str(tmp_path / "t.jinja"), "2020-02-29")
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(2))
    config = config_of(model, file, template=str(tmp_path / "t.jinja"), **{"data.heldout": 0.0})
    (tmp_path / "run").mkdir()
    found = prepare(config, model, chat, data_digests(config), RunFolder(tmp_path / "run"))
    text = chat.tokenizer.decode(found.train[0].prompt_tokens.tolist())
    assert text.startswith("2020-02-29<|im_end|>")
