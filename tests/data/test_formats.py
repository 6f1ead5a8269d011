"""formats: each format gives the same conversation; what is wrong with a row is said with its field."""

from __future__ import annotations

import pytest

from instil.data.formats import recognise
from instil.data.ledger import LedgerEntry
from instil.data.rows import parse_rows
from instil.data.sources import Row, Source
from instil.types import Conversation, Message

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HELLO = (Message("user", "Hi"), Message("assistant", "Hello"))
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}


def parsed(*values: dict, **options):
    rows = tuple(Row(value, f"f:{i}") for i, value in enumerate(values, start=1))
    return parse_rows(Source("f", "JSONL", rows, 0, ()), "train", **options)


def one(value: dict) -> Conversation:
    result = parsed(value)
    assert result.problems == ()
    (conversation,) = result.conversations
    return conversation


def problems(*values: dict) -> list[str]:
    result = parsed(*values)
    return [str(problem) for problem in result.problems]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", {"messages": [USER, ANSWER]}),
        ("conversations", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        (
            "conversations",
            {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        ),
        ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}),
        ("prompt-completion", {"prompt": [USER], "completion": [ANSWER]}),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello"}),
    ],
)
def test_each_format_gives_the_same_conversation(name, value):
    """One dialogue written in each format comes out as the same messages, and the format is told."""
    result = parsed({**value, "id": 7})
    assert result.conversations == (Conversation(HELLO, "f:1"),)
    assert result.format_name == name


def test_an_alpaca_input_follows_the_instruction_after_an_empty_line():
    """Alpaca's two texts are one user message."""
    value = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "task": "sums"}
    assert one(value) == Conversation(
        (Message("system", "Be brief."), Message("user", "Add.\n\n1 2"), Message("assistant", "3")), "f:1", (), "sums"
    )


def test_other_keys_of_a_message_reach_the_template():
    """Whatever a message holds besides role and content reaches the template; its weight is for us alone."""
    said = {"role": "assistant", "content": "Hello", "reasoning_content": "think", "weight": 1, "name": None}
    conversation = one({"messages": [USER, said]})
    assert conversation.messages[1].fields == {"reasoning_content": "think", "weight": 1, "name": None}
    assert conversation.messages[1].as_dict() == {key: value for key, value in said.items() if key != "weight"}


def test_text_parts_are_joined_by_a_line_break():
    """A list of text parts is the text that vLLM makes of it."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert one({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0].content == "a\nb"


def test_tool_calls_are_kept_with_arguments_as_an_object():
    """Arguments in JSON text, as OpenAI's API writes them, become the object that templates expect."""
    as_text = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "content": "1", "tool_call_id": "c1"}
    for call in (CALL, as_text):
        for said in (
            {"role": "assistant", "content": None},
            {"role": "assistant"},
            {"role": "assistant", "content": ""},
        ):
            conversation = one({"messages": [USER, {**said, "tool_calls": [call]}, result, ANSWER]})
            assert conversation.messages[1] == Message("assistant", "", {"tool_calls": [CALL]})
            assert conversation.messages[2] == Message("tool", "1", {"tool_call_id": "c1"})
    for nothing in (None, "", {}):
        call = {"function": {"name": "now", "arguments": nothing}}
        calls = one({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).messages[1].fields["tool_calls"]
        assert calls == [{"function": {"name": "now", "arguments": {}}}]
    assert one({"messages": [USER, {**ANSWER, "tool_calls": []}]}).messages == HELLO


def test_sharegpt_calls_become_tool_calls():
    """function_call and observation turns become an assistant message with a call, and a tool message."""
    value = {
        "system": "Use tools.",
        "tools": '[{"name": "add", "parameters": {}}]',
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
            {"from": "observation", "value": '{"sum": 2}'},
            {"from": "gpt", "value": "2"},
        ],
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
    assert one(value) == Conversation(
        (
            Message("system", "Use tools."),
            Message("user", "1+1?"),
            Message("assistant", "", {"tool_calls": [call]}),
            Message("tool", '{"sum": 2}'),
            Message("assistant", "2"),
        ),
        "f:1",
        ({"type": "function", "function": {"name": "add", "parameters": {}}},),
    )


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_may_be_a_list_or_json_text(tools):
    """The schemas of a messages row reach the template as they are."""
    assert one({"messages": [USER, ANSWER], "tools": tools}).tools == ({"name": "f"},)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_is_no_tools(tools):
    """Null, an empty list and empty text all mean that the row has no tools."""
    assert one({"messages": [USER, ANSWER], "tools": tools}).tools == ()


def test_answers_in_a_prompt_are_context_only():
    """In prompt-completion rows only the completion is learnt: earlier answers carry weight 0."""
    value = {"prompt": [USER, ANSWER, {"role": "user", "content": "And?"}], "completion": [ANSWER]}
    assert [dict(message.fields) for message in one(value).messages] == [{}, {"weight": 0}, {}, {}]


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("asistant", "'asistant' is not a role; did you mean 'assistant'?"),
        ("Assistant", "'Assistant' is not a role; did you mean 'assistant'?"),
        ("bot", "'bot' is not a role; did you mean 'assistant'?"),
        ("gpt", "'gpt' is not a role; did you mean 'assistant'?"),
        ("model", "'model' is not a role; did you mean 'assistant'?"),
        ("human", "'human' is not a role; did you mean 'user'?"),
        ("USER ", "'USER ' is not a role; did you mean 'user'?"),
        ("function", "'function' is not a role; did you mean 'tool'?"),
        ("zzz", "'zzz' is not a role; use one of system, developer, user, assistant, tool"),
        (7, "7 is not a role; use one of system, developer, user, assistant, tool"),
        (["user"], "['user'] is not a role; use one of system, developer, user, assistant, tool"),
        ("x" * 99, "'" + "x" * 56 + "... is not a role; use one of system, developer, user, assistant, tool"),
    ],
)
def test_an_unknown_role_names_the_nearest(role, hint):
    """A role is never mapped in silence: the error offers the role that was probably meant."""
    (line,) = problems({"messages": [USER, {"role": role, "content": "x"}]})
    assert line.partition(" or, for the whole file, ")[0] == f"f:1: messages[1].role: {hint}"


def test_an_unknown_role_of_a_whole_file_is_offered_a_mapping():
    """Where every row says `bot`, one line says how to read them all; the mapping then reads them."""
    row = {"messages": [USER, {"role": "bot", "content": "Hello"}]}
    first, second = problems(row, row)
    mapping = "{messages: messages, role: role, content: content, roles: {user: user, bot: assistant}}"
    assert first.endswith(f"did you mean 'assistant'? or, for the whole file, 'data.mapping={mapping}'")
    assert second.endswith("did you mean 'assistant'?")
    assert (
        parsed(row, mapping={"messages": "messages", "roles": {"bot": "assistant"}}).conversations[0].messages == HELLO
    )


def test_a_sharegpt_role_names_the_nearest():
    """The same for ShareGPT's own role names."""
    value = {"conversations": [{"from": "humn", "value": "x"}, {"from": "bot", "value": "x"}, {"role": "user"}]}
    assert problems(value) == [
        "f:1: conversations[0].from: 'humn' is not a role; did you mean 'human'?",
        "f:1: conversations[1].from: 'bot' is not a role; did you mean 'assistant'?",
        "f:1: conversations[2].from: is missing (keys: role); "
        "add one of human, user, gpt, assistant, system, function_call, observation, tool",
    ]


ROLES = "system, developer, user, assistant, tool"
TEXT_PARTS = 'only {"type": "text", "text": "..."} parts can be learnt'


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "x"}, f"messages[1].role: is missing (keys: content); add one of {ROLES}"),
        ({"role": "assistant"}, "messages[1].content: is missing (keys: role); add it, or remove the row"),
        ({"role": "assistant", "content": None}, "messages[1].content: is null, not text; write it as text"),
        ({"role": "assistant", "content": 3}, "messages[1].content: is a number, not text; write it as text"),
        ({"role": "assistant", "content": {"a": 1}}, "messages[1].content: is an object, not text; write it as text"),
        ({"role": "assistant", "content": True}, "messages[1].content: is true/false, not text; write it as text"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "u"}]},
            f"messages[1].content[1]: is a part of type 'image' with the keys type, url; {TEXT_PARTS}",
        ),
        ({"role": "assistant", "content": ["a"]}, f"messages[1].content[0]: is text; {TEXT_PARTS}"),
        ("x", 'messages[1]: is text, not an object; write {"role": ..., "content": ...}'),
        (
            {"role": "assistant", "tool_calls": {"name": "f"}},
            "messages[1].tool_calls: is an object, not a list; write it as a list of calls",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL, {"name": "f"}]},
            "messages[1].tool_calls[1]: is not a call of a named function; "
            'write {"type": "function", "function": {"name": ..., "arguments": {...}}}',
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]},
            "messages[1].tool_calls[0].arguments: broken JSON at column 2: single quote; "
            'JSON takes double quotes ("); write it with json.dumps',
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages[1].tool_calls[0].arguments: is a list; write them as an object",
        ),
    ],
)
def test_a_bad_message_is_named_with_its_field(message, expected):
    """Missing, null or mistyped parts of a message stand in the error with their place."""
    assert problems({"messages": [USER, message]}) == [f"f:1: {expected}"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": "x"}, "f:1: messages: is text, not a list of messages; write it as a list"),
        (
            {"messages": [USER, {"role": "tool", "content": "1"}, ANSWER]},
            "f:1: message 2 is a tool result, but no assistant message comes before it; put the call before its result",
        ),
        ({"messages": [USER, ANSWER], "task": 3}, "f:1: task: is a number, not text; write it as text"),
        (
            {"messages": [USER, ANSWER], "tools": {}},
            "f:1: tools: is an object, not a list; write it as a list of schemas",
        ),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "f:1: tools[0]: is text, not an object; write it as a schema"),
        (
            {"messages": [USER, ANSWER], "tools": "[{]"},
            "f:1: tools: broken JSON at column 3: expecting property name enclosed in double quotes; "
            "fix or remove the row",
        ),
        ({"messages": [USER, ANSWER], "system": 1}, "f:1: system: is a number, not text; write it as text"),
        (
            {"messages": [{"role": "system", "content": "x"}, ANSWER], "system": "y"},
            "f:1: system: stands beside a system message; keep one of the two",
        ),
        ({"prompt": "x", "completion": None}, "f:1: completion: is null, not text; write it as text"),
        (
            {"prompt": "x", "completion": [ANSWER]},
            "f:1: completion: is a list while prompt is text; make both text, or both lists of messages",
        ),
        (
            {"prompt": [USER], "completion": [USER, ANSWER]},
            "f:1: completion[0].role: 'user' cannot begin an answer; move the message to the prompt",
        ),
        (
            {"prompt": [USER, ANSWER], "completion": []},
            "f:1: completion: is an empty list; add the answer, or remove the row",
        ),
        ({"instruction": "x", "input": 4, "output": "y"}, "f:1: input: is a number, not text; write it as text"),
        ({"instruction": "x", "output": 4}, "f:1: output: is a number, not text; write it as text"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "f:1: history[0]: is not a question and an answer; write it as [question, answer], two texts",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}, {"from": "gpt", "value": "x"}]},
            "f:1: conversations[0].value: not JSON at column 1; write it as a JSON object",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"arguments": {}}'}]},
            'f:1: conversations[0].value: is not a call of a named function; write {"name": ..., "arguments": {...}}',
        ),
    ],
)
def test_a_bad_row_is_named_with_its_field(value, expected):
    """Everything else that is wrong with a row stands in one line with its field."""
    assert problems(value) == [expected]


def test_all_problems_of_a_file_are_collected():
    """A wrong row does not hide the next one, nor a wrong message the next in the same row."""
    bad = {"role": "bot", "content": "x"}
    result = parsed({"messages": [bad, bad]}, {"messages": [USER, ANSWER]}, {"message": [USER]})
    assert [problem.place for problem in result.problems] == [
        "f:1: messages[0].role",
        "f:1: messages[1].role",
        "f:3: messages",
    ]
    assert str(result.problems[2]) == (
        "f:3: messages: is missing (keys: message; the first row has the format messages); "
        "did you write it as 'message'?"
    )
    assert [conversation.origin for conversation in result.conversations] == ["f:2"]


def test_an_unknown_format_shows_the_keys_and_the_four_shapes():
    """Where nothing can be guessed, the user sees what the file has and what it could have."""
    (line,) = problems({"number": [1]})
    assert line == (
        "f:1: no known format has the keys number; say what they are: "
        "'data.mapping={prompt: COLUMN, completion: COLUMN}'; or write the rows as "
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} or '
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]} or '
        '{"prompt": "...", "completion": "..."} or '
        '{"instruction": "...", "input": "...", "output": "..."}'
    )
    assert recognise({"text": "x"}) is None
    assert problems({}) == [line.replace("keys number", "keys (none)")]


@pytest.mark.parametrize("nothing", ["", " \n\t", [], [{"type": "text", "text": " "}]])
def test_an_empty_answer_drops_its_row_into_the_ledger(nothing):
    """A row whose assistant says nothing is dropped, never in silence and never as an error."""
    result = parsed(
        {"messages": [USER, {"role": "assistant", "content": nothing}, USER, ANSWER]}, {"messages": [USER, ANSWER]}
    )
    assert result.dropped == (
        LedgerEntry(
            "f:1",
            "dropped",
            "train",
            0,
            0,
            0,
            rule="empty_answer",
            reason="the assistant says nothing in message 2 of 4",
        ),
    )
    assert [conversation.origin for conversation in result.conversations] == ["f:2"]
    assert result.problems == ()


def test_every_row_is_accounted_for():
    """Rows are conversations, dropped entries or problems: the three add up."""
    empty = {"role": "assistant", "content": ""}
    result = parsed(*[{"messages": [USER, m]} for m in (ANSWER, empty, {"role": "bot", "content": "x"}, ANSWER)])
    assert (len(result.conversations), len(result.dropped), len(result.problems)) == (2, 1, 1)


@pytest.mark.parametrize("weight", ["1", -1, True, float("nan"), 1e30, 1e-30])
def test_a_weight_is_a_number_from_zero(weight):
    """A message's weight that is no number from 0 is named with its place."""
    (line,) = problems({"messages": [USER, {**ANSWER, "weight": weight}]})
    assert line.startswith("f:1: messages[1].weight: is ")
    assert one({"messages": [USER, {**ANSWER, "weight": 0.5}]}).messages[1].weight == 0.5
    assert one({"messages": [USER, {**ANSWER, "weight": None}]}).messages[1].weight == 1.0


@pytest.mark.parametrize("value", [{"messages": []}, {"messages": [USER]}, {"prompt_tokens": [1], "answer_tokens": []}])
def test_a_row_without_an_answer_is_dropped_and_under_strict_a_problem(value):
    """Nothing to learn is a ledger line and a note, or exit 3 where the user asked for strictness."""
    good = {"prompt_tokens": [1], "answer_tokens": [2]} if "answer_tokens" in value else {"messages": [USER, ANSWER]}
    result = parsed(good, value)
    assert [entry.origin for entry in result.dropped] == ["f:2"]
    assert result.notes == (f"f: 1 rows dropped ({result.dropped[0].rule}) (f:2)",)
    (problem,) = parsed(good, value, strict=True).problems
    assert problem.place == "f:2"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Hi", "answer": "Hello"}, "question = prompt, answer = answer"),
        ({"query": "Hi", "response": "Hello", "id": 3}, "query = prompt, response = answer (not read: id)"),
        ({"input": "Hi", "output": "Hello"}, "input = prompt, output = answer"),
        ({"instruction": "Hi", "response": "Hello"}, "instruction = prompt, response = answer"),
        ({"prompt": "Hi", "response": "Hello", "task": "t"}, "prompt = prompt, response = answer"),
    ],
)
def test_two_columns_that_can_only_be_prompt_and_answer_are_read(row, said):
    """Evident pairs load without configuration, and what was read as what is said."""
    result = parsed(row)
    assert result.conversations[0].messages == HELLO
    assert result.format_name == said


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "q", "context": "c", "answer": "a"}, "{prompt: [question, context], completion: answer}"),
        (
            {"instruction": "i", "context": "c", "response": "r"},
            "{prompt: [instruction, context], completion: response}",
        ),
        ({"question": "q", "answer": "a", "response": "r"}, "{prompt: question, completion: response}"),
        ({"input": "i", "output": ["a", "b"]}, "{prompt: input, completion: output.0}"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_a_mapping(row, mapping):
    """A column is never left out of the prompt by guessing."""
    (line,) = problems(row)
    assert f"'data.mapping={mapping}'" in line


def test_alpaca_history_is_earlier_turns():
    """Each pair of `history` is a question and an answer before the row's own."""
    value = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert [(m.role, m.content) for m in one(value).messages] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip


def test_each_instance_of_an_instruction_is_a_conversation():
    """Self-instruct rows: the answers of a row are numbered on."""
    value = {"instruction": "Add", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "none"}]}
    first, second = parsed(value).conversations
    assert (first.messages[0].content, first.first_turn, second.messages[0].content, second.first_turn) == (
        "Add\n\n1 1", 0, "Add", 1
    )  # fmt: skip


def test_an_instance_without_an_answer_leaves_the_others():
    """The row is used, and the note says what is missing from it."""
    result = parsed({"instruction": "Add", "instances": [{"input": "1", "output": " "}, {"output": "none"}]})
    assert [each.messages[1].content for each in result.conversations] == ["none"]
    assert result.notes == ("f: 1 conversations without an answer left out of rows that have others (f:1)",)


BLOCKS = [
    {"type": "reasoning", "value": "I add."},
    {"type": "text", "value": "Wait."},
    {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
]


def test_typed_blocks_become_text_reasoning_and_calls():
    """Each block goes where the template looks for it."""
    said = one({"messages": [USER, {"role": "assistant", "content": BLOCKS, "loss_weight": 0.5}]}).messages[1]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert said == Message("assistant", "Wait.", {"reasoning_content": "I add.", "tool_calls": [call], "weight": 0.5})


def test_a_block_of_an_assistant_elsewhere_is_refused():
    """A user neither reasons nor calls."""
    for block in (BLOCKS[0], BLOCKS[2]):
        (line,) = problems({"messages": [{"role": "user", "content": [block]}, ANSWER]})
        assert line.startswith(f"f:1: messages[0].content[0]: is a part of type {block['type']!r}")


@pytest.mark.parametrize(
    ("said", "weight"),
    [
        ({"train": False}, 0.0), ({"train": True}, 1.0), ({"train": True, "weight": 0.5}, 0.5), ({"loss_weight": 2}, 2.0),
        ({"train": False, "weight": 0}, 0.0), ({"train": None}, 1.0), ({"weight": 1, "loss_weight": 1}, 1.0),
    ],
)  # fmt: skip
def test_how_much_a_message_counts(said, weight):
    """train, weight and loss_weight say one thing, and reach no template."""
    message = one({"messages": [USER, {**ANSWER, **said}]}).messages[1]
    assert message.weight == weight
    assert message.as_dict() == ANSWER
    if "train" not in said:
        talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", **said}]
        assert one({"conversations": talk}).messages[1].weight == weight


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"train": False, "weight": 1}, "train: is false beside a weight of 1"),
        ({"train": True, "weight": 0}, "train: is true beside a weight of 0"),
        ({"weight": 1, "loss_weight": 0}, "loss_weight: is 0 beside a weight of 1"),
        ({"train": "no"}, "train: is text, not true or false"),
        ({"loss_weight": -1}, "loss_weight: is -1, not 0 or a number from 1e-9 to 1e9"),
    ],
)
def test_contradictory_weights_are_refused(said, field):
    """Nobody can know which of the two was meant."""
    (line,) = problems({"messages": [USER, {**ANSWER, **said}]})
    assert line.startswith(f"f:1: messages[1].{field}; ")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]}, {"prompt": "Hi", "completion": "Hello"}, {"question": "Hi", "answer": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"}, {"instruction": "Hi", "instances": [{"output": "Hello"}]},
        {"prompt": {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Hello"}]}},
        {"prompt_tokens": [1], "answer_tokens": [2]},
    ],
)  # fmt: skip
def test_the_fields_of_a_row_are_read_in_every_format(row):
    """weight, task, tools and the template's variables mean the same everywhere."""
    more = {"weight": 0.25, "task": "greet", "tools": '[{"function": {"name": "f"}}]'}
    for name in ("template_args", "chat_template_kwargs"):
        conversation = one({**row, **more, name: {"enable_thinking": False}})
        assert (conversation.weight, conversation.task) == (0.25, "greet")
        assert conversation.template_args == {"enable_thinking": False}
        assert conversation.tools == ({"function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"weight": -1}, "weight: is -1, not 0 or a number from 1e-9 to 1e9"),
        ({"weight": "much"}, "weight: is 'much', not 0 or a number from 1e-9 to 1e9"),
        ({"weight": True}, "weight: is True, not 0 or a number from 1e-9 to 1e9"),
        ({"weight": 10**400}, "weight: is 1000"),
        ({"template_args": [1]}, "template_args: is a list, not an object"),
        ({"template_args": "{"}, "template_args: the JSON stops in the middle"),
        ({"template_args": {"a": 1}, "chat_template_kwargs": {"a": 2}}, "chat_template_kwargs: differs from"),
    ],
)
def test_a_bad_field_of_a_row_is_named(field, expected):
    """Wrong weights and variables stand in one line."""
    (line,) = problems({"messages": [USER, ANSWER], **field})
    assert line.startswith(f"f:1: {expected}")


def test_a_weight_as_text_is_a_number():
    """A CSV file has no other way to write one."""
    assert one({"prompt": "p", "completion": "c", "weight": "0.5"}).weight == 0.5
    assert one({"prompt": "p", "completion": "c", "weight": ""}).weight == 1.0


def test_developer_messages_stay():
    """OpenAI's newer name of the system role reaches the template."""
    talk = [{"role": "developer", "content": "Be brief."}, USER, ANSWER]
    assert one({"messages": talk}).messages[0] == Message("developer", "Be brief.")


def test_messages_after_the_last_answer_stay_and_are_told():
    """A conversation that ends on the user is used as far as it goes."""
    result = parsed({"messages": [USER, ANSWER, USER]})
    assert len(result.conversations[0].messages) == 3
    assert result.notes == ("f: 1 rows end with messages after the last answer, from which nothing is learnt (f:1)",)


def test_a_weight_on_a_question_is_told():
    """Only answers are learnt, so a weight elsewhere cannot be obeyed."""
    result = parsed({"messages": [{**USER, "weight": 1}, ANSWER]})
    assert result.notes == ("f: 1 rows give a weight to messages that are no answers; only answers are learnt (f:1)",)
    assert parsed({"messages": [{**USER, "weight": 0}, ANSWER]}).notes == ()


def test_a_column_that_a_known_format_does_not_read_is_told():
    """A context beside alpaca's columns would be missed by the prompt."""
    assert parsed({"instruction": "i", "context": "c", "output": "o"}).notes == (
        "f: alpaca does not read the columns context",
    )


def test_conversations_know_their_source():
    """The number of the source goes with each conversation."""
    assert parsed({"messages": [USER, ANSWER]}, number=3).conversations[0].source == 3
