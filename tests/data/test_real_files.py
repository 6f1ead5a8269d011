"""Real files, as their authors wrote them: each loads with the row count of its README, or says what it lacks."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from instil.data.mixture import load_conversations
from instil.data.spec import SourceSpec
from instil.errors import DataError

FORMATS = Path(__file__).parents[3] / "shared" / "data" / "formats"

pytestmark = pytest.mark.skipif(not FORMATS.is_dir(), reason=f"needs the real files in {FORMATS}")


@pytest.mark.parametrize(
    ("name", "rows", "container", "format_name"),
    [
        ("alpaca_identity_91.json", 91, "JSON array", "alpaca"),
        ("sharegpt_identity_350.json", 350, "JSON array", "conversations"),
        ("sharegpt_toolcall_en_200.json", 200, "JSON array", "conversations"),
        ("sharegpt_toolcall_zh_120.json", 120, "JSON array", "conversations"),
        ("prompt_completion_superbowl_300.jsonl", 300, "JSONL", "prompt-completion"),
    ],
)
def test_a_real_file_loads_whole(name, rows, container, format_name):
    """Every row becomes a conversation, none is dropped."""
    loaded = load_conversations([str(FORMATS / name)])
    assert (len(loaded.conversations), len(loaded.dropped)) == (rows, 0)
    assert loaded.recognised == (f"{FORMATS / name}: {container}, {rows} rows, {format_name}",)


def test_the_turns_of_a_real_file_are_all_there():
    """Counted in the file with grep: 492 questions, 492 answers, 138 calls and 138 results."""
    loaded = load_conversations([str(FORMATS / "sharegpt_toolcall_en_200.json")])
    messages = [message for each in loaded.conversations for message in each.messages]
    assert sum(message.role == "user" for message in messages) == 492
    assert sum(message.role == "assistant" and "tool_calls" not in message.fields for message in messages) == 492
    assert sum("tool_calls" in message.fields for message in messages) == 138
    assert sum(message.role == "tool" for message in messages) == 138
    assert sum(len(each.tools) > 0 for each in loaded.conversations) == 200 - 73  # 73 rows have "tools": "[]"


def test_the_blocks_of_a_real_file_are_all_there():
    """Counted in the file: 67 assistant messages, each with reasoning; 37 calls in 32 of them."""
    loaded = load_conversations([str(FORMATS / "blocks_reasoning_tools_30.jsonl")])
    said = [message for each in loaded.conversations for message in each.messages if message.role == "assistant"]
    calls = [call for message in said for call in message.fields.get("tool_calls", ())]
    assert (len(loaded.conversations), len(said), len(calls)) == (30, 67, 37)
    assert all(message.reasoning for message in said)
    assert sum("tool_calls" in message.fields for message in said) == 32
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)


def test_every_answer_of_real_trees_is_learnt_once():
    """The file has 420 answers (counted with grep); a second walk over the JSON gives their texts."""
    path = FORMATS / "oasst_tree_60.jsonl.gz"
    loaded = load_conversations([str(path)])
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    expected, todo = [], [row["prompt"] for row in rows]
    while todo:
        node = todo.pop()
        todo += node["replies"]
        expected += [node["text"]] if node["role"] == "assistant" else []
    learnt = [m.content for each in loaded.conversations for m in each.messages if m.role == "assistant" and m.weight]
    assert len(expected) == 420
    assert sorted(learnt) == sorted(expected)
    assert len({each.origin for each in loaded.conversations}) == 60


def test_the_seed_tasks_are_one_conversation_each():
    """175 tasks with one instance each, every text as it stands in the file."""
    path = FORMATS / "selfinstruct_seed_175.jsonl"
    loaded = load_conversations([str(path)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [each.messages[1].content for each in loaded.conversations] == [r["instances"][0]["output"] for r in rows]


@pytest.mark.parametrize(("name", "rows"), [("train.jsonl.gz", 7473), ("test_200.jsonl", 200)])
def test_gsm8k_loads_without_configuration(name, rows):
    """question and answer can only be read in one way, and the sentence says how."""
    loaded = load_conversations([str(FORMATS.parent / "gsm8k" / name)])
    assert len(loaded.conversations) == rows
    assert loaded.recognised[0].endswith("question = prompt, answer = answer")


@pytest.mark.parametrize(
    ("name", "used", "dropped"),
    [
        ("formats/text_wikisql_1000.jsonl.gz", 1000, 0),
        ("formats/taskmaster4_210.json.gz", 201, 9),  # 9 rows with a call whose arguments are broken JSON
        ("instruct_mix/train.jsonl.gz", 3233, 0),
        ("instruct_mix/heldout_tasks.jsonl.gz", 500, 0),
        ("prompts/svamp_700.jsonl", 700, 0),
    ],
)
def test_the_mapping_in_the_error_loads_the_file(name, used, dropped):
    """What cannot be read without guessing is refused with a mapping that works as it is printed."""
    path = str(FORMATS.parent / name)
    with pytest.raises(DataError) as caught:
        load_conversations([path])
    (line,) = caught.value.lines()
    loaded = load_conversations([SourceSpec(path, printed_mapping(line))])
    assert (len(loaded.conversations), len(loaded.dropped)) == (used, dropped)
    assert {entry.rule for entry in loaded.dropped} <= {"broken_call"}


def test_the_calls_of_real_dialogues_are_kept():
    """In Taskmaster's order: the user asks, the calls with their results follow, then the assistant's words."""
    path = str(FORMATS / "taskmaster4_210.json.gz")
    mapping = {"messages": "utterances", "role": "speaker", "content": "text", "calls": "annotations"}
    first = load_conversations([SourceSpec(path, mapping)]).conversations[0]
    assert [message.role[0] for message in first.messages] == list("u" + "at" * 5 + "aua" + "ta")
    assert first.messages[1].fields["tool_calls"] == [
        {"type": "function", "function": {"name": "get_menu_items", "arguments": {"query": "Mocha"}}}
    ]
    assert first.messages[2].content == '{"menu_items":[{"menu_item_id":"mocha-3095","name":"Mocha"}]}'


def printed_mapping(line: str) -> Any:
    """The mapping as a user would paste it: through the shell, then through YAML."""
    start = line.index("'data.mapping=")
    (word,) = shlex.split(line[start : line.index("}'", start) + 2])
    return YAML(typ="safe", pure=True).load(word.removeprefix("data.mapping="))
