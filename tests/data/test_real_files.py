"""Real files, as their authors wrote them: each loads with the row count of its README, or says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from instil.data.mixture import load_conversations
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks_reasoning_tools_30.jsonl", "messages[2].content[0]: is a part of type 'reasoning'"),
        ("oasst_tree_60.jsonl.gz", "no known format has the keys message_tree_id, tree_state, prompt"),
        ("selfinstruct_seed_175.jsonl", "no known format has the keys id, name, instruction, instances"),
        ("taskmaster4_210.json.gz", "no known format has the keys conversation_id, vertical, scenario"),
        ("text_wikisql_1000.jsonl.gz", "no known format has the keys text;"),
    ],
)
def test_a_real_file_of_another_shape_says_so(name, expected):
    """What cannot be turned into conversations without guessing is refused with its keys."""
    with pytest.raises(DataError) as caught:
        load_conversations([str(FORMATS / name)])
    assert any(expected in line for line in caught.value.lines())
