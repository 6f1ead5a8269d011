"""mapping: columns that the user names become a conversation; the mapping that an error prints can be pasted."""

from __future__ import annotations

import shlex

import pytest
from ruamel.yaml import YAML

from instil.data.rows import parse_rows
from instil.data.sources import Row, Source
from instil.data.spec import MAPPING_KEYS, SourceSpec, override, spec_problems
from instil.types import Message

HELLO = (Message("user", "Hi"), Message("assistant", "Hello"))


def parsed(mapping, *values, strict=False):
    rows = tuple(Row(value, f"f:{i}") for i, value in enumerate(values, start=1))
    return parse_rows(Source("f", "JSONL", rows, 0, ()), "train", mapping, strict=strict)


def messages(mapping, value):
    result = parsed(mapping, value)
    assert result.problems == ()
    return result.conversations[0].messages


def pasted(line: str):
    """The mapping of an override, as the shell and then YAML read it."""
    start = line.index("'data.mapping=")
    (word,) = shlex.split(line[start : line.index("}'", start) + 2])
    return YAML(typ="safe", pure=True).load(word.removeprefix("data.mapping="))


@pytest.mark.parametrize(
    ("mapping", "value"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "Hi", "a": "Hello"}),
        ({"prompt": "x.q", "completion": "a.1"}, {"x": {"q": "Hi"}, "a": ["no", "Hello"]}),
        ({"prompt": "x.q", "completion": "a"}, {"x.q": "Hi", "x": {"q": "no"}, "a": "Hello"}),
        ({"prompt": ["q", "none", "empty"], "completion": "a"}, {"q": "Hi", "none": None, "empty": " ", "a": "Hello"}),
        ({"text": "t", "split_at": "i"}, {"t": "HiHello"}),
        ({"messages": "d"}, {"d": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
        (
            {"messages": "d.said", "role": "who", "content": "what", "roles": {"A": "user", "B": "assistant"}},
            {"d": {"said": [{"who": "A", "what": "Hi", "at": 3}, {"who": "B", "what": "Hello"}]}},
        ),
    ],
)
def test_each_kind_of_mapping_gives_the_same_conversation(mapping, value):
    """Columns, dotted paths, elements of lists, one text, and messages under other names."""
    assert messages(mapping, value) == HELLO


def test_several_columns_are_joined_by_an_empty_line():
    """A definition and an input make one prompt; a number is its text."""
    mapping = {"prompt": ["d", "i"], "completion": "a", "system": ["s", "none"]}
    assert messages(mapping, {"d": "Add.", "i": 12, "a": 2.5, "s": "Be brief."}) == (
        Message("system", "Be brief."),
        Message("user", "Add.\n\n12"),
        Message("assistant", "2.5"),
    )


def test_what_was_read_as_what_is_said():
    """The name of the format shows the mapping."""
    result = parsed({"prompt": ["d", "i"], "completion": "a"}, {"d": "x", "i": "y", "a": "z"})
    assert result.format_name == "mapped (d + i = prompt, a = completion)"


def test_weight_task_and_tools_may_stand_in_other_columns():
    """Also beside a format that is known."""
    value = {"prompt": "Hi", "completion": "Hello", "score": 0.5, "kind": "greet", "functions": [{"name": "f"}]}
    result = parsed({"weight": "score", "task": "kind", "tools": "functions"}, value)
    assert result.format_name == "prompt-completion"
    (each,) = result.conversations
    assert (each.weight, each.task, each.tools, each.messages) == (0.5, "greet", ({"name": "f"},), HELLO)


def test_a_column_of_the_prompt_is_not_read_a_second_time():
    """`system` in the prompt is not the system text as well."""
    assert messages({"prompt": ["system", "q"], "completion": "a"}, {"system": "S", "q": "Hi", "a": "Hello"}) == (
        Message("user", "S\n\nHi"),
        HELLO[1],
    )


@pytest.mark.parametrize(
    ("mapping", "value", "expected"),
    [
        ({"prompt": "qq", "completion": "a"}, {"q": "x", "a": "y"}, "qq: is missing (keys: q, a); did you mean 'q'?"),
        (
            {"prompt": "q", "completion": "a"},
            {"q": "x", "a": ["y"]},
            "a: is a list, not text; name one of its elements: a.0",
        ),
        (
            {"prompt": "q", "completion": "a"},
            {"q": {"b": 1}, "a": "y"},
            "q: is an object, not text; name what is in it",
        ),
        ({"prompt": "q", "completion": "a"}, {"q": None, "a": "y"}, "q: is null, not text"),
        ({"text": "t", "split_at": "A:"}, {"t": "x"}, "t: holds 'A:' 0 times, not once"),
        ({"text": "t", "split_at": "A:"}, {"t": "A: A:"}, "t: holds 'A:' 2 times, not once"),
        ({"messages": "m"}, {"m": "x"}, "m: is text, not a list of messages"),
        ({"messages": "m"}, {"m": [3]}, "m[0]: is a number, not an object"),
        (
            {"messages": "m", "role": "who"},
            {"m": [{"who": "Bot", "content": "x"}]},
            "m[0].who: 'Bot' is not a role; did",
        ),
        (
            {"messages": "m", "calls": "c"},
            {"m": [{"role": "user", "content": "x", "c": [{"name": "z"}]}]},
            "m[0].c[0]: ",
        ),
    ],
)
def test_a_row_that_the_mapping_does_not_fit_is_named(mapping, value, expected):
    """The field, what it holds, and what to write instead."""
    (line,) = map(str, parsed(mapping, value).problems)
    assert line.startswith(f"f:1: {expected}")


CALLS = [
    {"name": "api_call", "value": "add"},
    {"name": "request", "value": '{"a": 1}'},
    {"name": "api_response", "value": "add"},
    {"name": "response", "value": "{sum: 1"},
    {"name": "api_call", "value": "now"},
    {"name": "response", "value": "12:00"},
]


def call(name, arguments):
    return Message(
        "assistant", "", {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
    )


def test_calls_in_a_dialogue_are_answers_and_their_results_tool_messages():
    """The calls at the user's words follow them; those at the assistant's lead to its words."""
    mapping = {"messages": "m", "calls": "notes"}
    for at in (0, 1):
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        talk[at]["notes"] = CALLS
        assert messages(mapping, {"m": talk}) == (
            HELLO[0],
            call("add", {"a": 1}),
            Message("tool", "{sum: 1", {"name": "add"}),
            call("now", {}),
            Message("tool", "12:00", {"name": "now"}),
            HELLO[1],
        )


def test_a_broken_call_drops_its_row():
    """A log cannot be corrected by hand, so the row goes to the ledger; under strict it is a problem."""
    broken = [{"name": "api_call", "value": "add"}, {"name": "request", "value": "{a:"}]
    talk = {"m": [{"role": "user", "content": "Hi", "notes": broken}, {"role": "assistant", "content": "Hello"}]}
    fine = {"m": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    mapping = {"messages": "m", "calls": "notes"}
    result = parsed(mapping, fine, talk)
    assert [(entry.origin, entry.rule) for entry in result.dropped] == [("f:2", "broken_call")]
    assert [problem.place for problem in parsed(mapping, fine, talk, strict=True).problems] == [
        "f:2: m[0].notes[1].value"
    ]


def test_utterances_of_one_speaker_in_a_row_are_joined():
    """Templates want turns that alternate; the note counts what was joined."""
    said = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    result = parsed({"messages": "m"}, {"m": [{"role": role, "content": text} for role, text in said]})
    assert result.conversations[0].messages == (Message("user", "a\nb"), Message("assistant", "c\nd"))
    assert result.notes == ("f: 2 messages joined to the one before, which has the same role (f:1, ...)",)


@pytest.mark.parametrize(
    "rows",
    [
        [{"Frage": "Wie?", "Antwort": "So."}, {"Frage": "Wer?", "Antwort": "Ich."}],
        [{"id": "7", "it's": "Wie?", "b: c": "So."}],
        [{"meta": {"lang": "de"}, "dialog": [{"who": "Anna", "said": "Hi"}, {"who": "Bert", "said": "Hello"}]}],
        [{"doc": {"question": "q", "answers": ["a", "b"]}}],
        [{"text": f"### Instruction:\nAdd {i}.\n### Response:\n{i}"} for i in range(3)],
        [{"talk": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
        [{"null": "q", "true": "a"}],
    ],
)
def test_the_mapping_in_the_error_can_be_pasted_and_loads(rows):
    """For formats that nobody has heard of the error prints a mapping, which the shell and YAML take as it stands."""
    (problem,) = parsed({}, *rows).problems
    mapping = pasted(str(problem))
    result = parsed(mapping, *rows)
    assert (result.problems, len(result.conversations)) == ((), len(rows))
    assert all([m.role for m in each.messages] == ["user", "assistant"] for each in result.conversations)


@pytest.mark.parametrize(
    "mapping", [{"text": "t", "split_at": "\nA: "}, {"prompt": ["a b", "it's é"], "completion": "\u2028"}]
)
def test_an_override_is_what_it_was(mapping):
    """Line breaks, quotes and odd characters survive the shell and YAML."""
    assert pasted(override(mapping)) == mapping


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"promt": "q", "completion": "a"}, "f: mapping.promt: is not a key of a mapping; did you mean 'prompt'?"),
        ({"zzz": "q"}, f"f: mapping.zzz: is not a key of a mapping; use {', '.join(MAPPING_KEYS)}"),
        ({"prompt": 3, "completion": "a"}, "f: mapping.prompt: is 3; give the column, or list of columns, that make"),
        ({"prompt": [], "completion": "a"}, "f: mapping.prompt: is []; give the column"),
        ({"prompt": "q"}, "f: mapping: prompt without completion; add completion"),
        ({"completion": "a"}, "f: mapping.completion: stands without prompt; add prompt"),
        ({"text": "t"}, "f: mapping: text without split_at; add split_at"),
        ({"text": "t", "split_at": ""}, "f: mapping.split_at: is ''; give the text that ends the prompt"),
        ({"prompt": "q", "completion": "a", "messages": "m"}, "f: mapping: prompt and messages exclude each other"),
        (
            {"messages": "m", "roles": {"bot": "asistant"}},
            "f: mapping.roles.bot: 'asistant' is not a role; did you mean",
        ),
        ({"messages": "m", "roles": ["bot"]}, "f: mapping.roles: is ['bot']; write {name in the file: role}"),
        ("prompt", "f: mapping: is 'prompt'; write {prompt: COLUMN"),
    ],
)
def test_a_wrong_mapping_is_named_with_the_nearest_key(mapping, expected):
    """A mapping is checked before any file is opened."""
    problems = [str(problem) for problem in spec_problems(SourceSpec("f", mapping))]
    assert any(line.startswith(expected) for line in problems), problems


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), True, "2"])
def test_repeat_and_weight_are_numbers_from_zero(bad):
    """How often and how much a source counts."""
    assert len(spec_problems(SourceSpec("f", repeat=bad, weight=bad))) == 2
    assert spec_problems(SourceSpec("f", repeat=0.5, weight=None)) == []
