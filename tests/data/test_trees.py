"""trees: the paths of a tree of messages, in which every answer is learnt once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instil.data.rows import parse_rows
from instil.data.sources import Row, Source


def parsed(tree):
    rows = (Row({"message_tree_id": "x", "prompt": tree}, "f:1"),)
    return parse_rows(Source("f", "JSONL", rows, 0, ()), "train")


def node(role, text, *replies, **more):
    return {"role": role, "text": text, "replies": list(replies), **more}


def asked(text, *replies, **more):
    return node("prompter", text, *replies, **more)


def answered(text, *replies, **more):
    return node("assistant", text, *replies, **more)


def paths(result):
    """Each path as `text`, with brackets around what is learnt."""
    return [
        " ".join(f"[{m.content}]" if m.role == "assistant" and m.weight else m.content for m in each.messages)
        for each in result.conversations
    ]


def test_each_path_is_a_conversation_and_each_answer_is_learnt_once():
    """Written by hand: an answer of an earlier path is context; questions without an answer are left off."""
    tree = asked("q", answered("a", asked("r", answered("b"), answered("c")), asked("s")), answered("d", asked("t")))
    result = parsed(tree)
    assert paths(result) == ["q [a] r [b]", "q a r [c]", "q [d]"]
    assert [each.first_turn for each in result.conversations] == [0, 2, 4]
    assert {each.origin for each in result.conversations} == {"f:1"}
    assert result.format_name == "message tree"


def test_deleted_and_empty_messages_go_with_what_hangs_on_them():
    """A reply to something that is not there cannot be understood; the note counts them."""
    tree = asked("q", answered("a", deleted=True), answered(" ", asked("r", answered("b"))), answered("c"))
    result = parsed(tree)
    assert paths(result) == ["q [c]"]
    assert result.notes == (
        "f: 1 deleted messages left out, with the replies to them (f:1)",
        "f: 1 empty answers left out, with the replies to them (f:1)",
    )


def test_a_tree_without_answers_is_dropped():
    """Its line in the ledger says why."""
    for tree in (asked("q"), asked("q", asked("r")), asked("q", deleted=True)):
        assert [entry.rule for entry in parsed(tree).dropped] == ["no_answer"]


def test_a_bad_node_is_named_with_its_place():
    """Once, though several paths go through it."""
    tree = asked("q", node("asistant", "a", answered("b"), answered("c")), answered(3), answered("x", **{"replies": 7}))
    assert [str(problem) for problem in parsed(tree).problems] == [
        "f:1: prompt.replies[0].role: 'asistant' is not a role; did you mean 'assistant'?",
        "f:1: prompt.replies[1].text: is a number, not text; write it as text",
        "f:1: prompt.replies[2].replies: is a number, not a list; write it as a list of messages",
    ]


TREES = st.recursive(
    st.builds(lambda: answered("x")),
    lambda inner: st.builds(
        lambda role, replies: node(role, "x", *replies),
        st.sampled_from(["prompter", "assistant"]),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


@given(TREES)
def test_no_answer_is_lost_or_learnt_twice(tree):
    """As many answers are learnt as the tree has assistant nodes, and (origin, turn) names one message only."""
    numbered, todo = 0, [tree]
    for each in todo:
        each["text"] = str(numbered := numbered + 1)
        todo += each["replies"]
    result = parsed(asked("root", tree))
    learnt = [m.content for each in result.conversations for m in each.messages if m.role == "assistant" and m.weight]
    assert sorted(learnt) == sorted(each["text"] for each in todo if each["role"] == "assistant")
    turns = [
        each.first_turn + i
        for each in result.conversations
        for i, _ in enumerate(m for m in each.messages if m.role == "assistant")
    ]
    assert turns == list(range(len(turns)))
