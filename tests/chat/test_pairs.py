"""What is too long is dropped, refused or trimmed by whole old turns; what the user tokenised is taken as it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from chat_samples import CHATML, SPACED

from instil.chat.certificate import certify
from instil.chat.pairs import make_examples, served_prompt
from instil.chat.targets import Targets
from instil.chat.template import Template
from instil.chat.tokenizer import load_tokenizer
from instil.chat.turns import ChatOptions
from instil.errors import TemplateError
from instil.types import KINDS, Conversation, Message, TokenPair

U, A, S, T = (
    lambda text, role=role, **fields: Message(role, text, fields) for role in ("user", "assistant", "system", "tool")
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LONG = Conversation(
    (S("Be kind."), U("first question"), A("first answer"), U("second question"), A("second answer"), U("third question"),
     A("third answer")), "a:1",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(chatml):
    return load_tokenizer(chatml)


@pytest.fixture(scope="module")
def template():
    return Template(PLAIN, {}, place="t")


def made(row, tokenizer, template, limit=None, too_long="drop", **targets):
    options = ChatOptions(limit_tokens=limit, too_long=too_long, targets=Targets(**targets))
    pairs = make_examples(row if isinstance(row, list) else [row], tokenizer, template, options)
    problems = certify(pairs.examples, row if isinstance(row, list) else [row], tokenizer, template, {}, options)[1]
    assert problems == []
    return pairs


def computed(example):
    """Tokens that go through the model: the last is only predicted."""
    return len(example.prompt_tokens) + len(example.answer_tokens) - 1


def text(tokenizer, messages, answer):
    """The trimmed conversation, written out."""
    told = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    return tokenizer.encode(f"{told}<|im_start|>assistant\n{answer}<|im_end|>")


def test_too_long_is_dropped_and_named(tokenizer, template):
    """too_long=drop: the long turns of a row go, the short stay, and each that goes is listed with its sizes."""
    sizes = [computed(example) for example in made(LONG, tokenizer, template).examples]
    pairs = made(LONG, tokenizer, template, limit=sizes[1])
    assert [example.turn for example in pairs.examples] == [0, 1]
    (dropped,) = pairs.dropped
    assert (dropped.origin, dropped.turn, dropped.limit_tokens) == ("a:1", 2, sizes[1])
    assert dropped.prompt_tokens + dropped.answer_tokens - 1 == sizes[2]
    assert pairs.problems == []


def test_limit_is_exact(tokenizer, template):
    """An example of exactly the limit stays; of one token more it goes."""
    size = computed(made(LONG, tokenizer, template).examples[-1])
    assert len(made(LONG, tokenizer, template, limit=size).examples) == 3
    assert len(made(LONG, tokenizer, template, limit=size - 1).examples) == 2


def test_too_long_can_be_an_error(tokenizer, template):
    """too_long=error: a problem that names the answer, its size and the limit."""
    sizes = [computed(example) for example in made(LONG, tokenizer, template).examples]
    pairs = made(LONG, tokenizer, template, limit=sizes[1], too_long="error")
    (problem,) = pairs.problems
    assert (problem.place, problem.rule) == ("a:1", "too_long")
    assert f"answer 2 needs {sizes[2]:,} tokens, more than {sizes[1]:,}" in problem.what


def test_trimming_takes_whole_old_turns(tokenizer, template):
    """too_long=trim-context: the oldest turns leave, as few as do; system prompt, last question and answer stay."""
    full = made(LONG, tokenizer, template).examples[-1]
    one_less = text(tokenizer, [LONG.messages[i] for i in (0, 3, 4, 5)], "third answer")
    two_less = text(tokenizer, [LONG.messages[i] for i in (0, 5)], "third answer")
    for limit, expected in (
        (computed(full), [*full.prompt_tokens.tolist(), *full.answer_tokens.tolist()]),
        (computed(full) - 1, one_less), (len(one_less) - 1, one_less), (len(one_less) - 2, two_less),
        (len(two_less) - 1, two_less),
    ):  # fmt: skip
        pairs = made(LONG, tokenizer, template, limit=limit, too_long="trim-context")
        (example,) = [example for example in pairs.examples if example.turn == 2]
        assert [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()] == expected
        assert example.cut_tokens == computed(full) + 1 - len(expected)
        assert example.answer_tokens.tolist() == full.answer_tokens.tolist()
        assert 2 not in [dropped.turn for dropped in pairs.dropped]


def test_what_cannot_be_trimmed_is_dropped(tokenizer, template):
    """Header, last question and answer are never cut: where they alone are too long the example goes."""
    two_less = text(tokenizer, [LONG.messages[i] for i in (0, 5)], "third answer")
    pairs = made(LONG, tokenizer, template, limit=len(two_less) - 2, too_long="trim-context")
    assert 2 not in [example.turn for example in pairs.examples]
    assert 2 in [dropped.turn for dropped in pairs.dropped]


def test_trimming_never_leaves_a_result_without_its_call(tokenizer, template):
    """Turns leave from question to question: a tool's result stays with the call that asked for it."""
    row = Conversation(
        (U("one " * 9), A("", tool_calls=[CALL]), T("result"), A("so"), U("two"), A("", tool_calls=[CALL]), T("more"),
         A("end")),
        "a:1",
    )  # fmt: skip
    full = made(row, tokenizer, template).examples
    limit = computed(full[-1]) - 1
    (example,) = [
        e for e in made(row, tokenizer, template, limit=limit, too_long="trim-context").examples if e.turn == 3
    ]
    prompt = tokenizer.decode(example.prompt_tokens)
    assert prompt.startswith("<|im_start|>user\ntwo<|im_end|>")
    assert prompt.count('"f"') == prompt.count("<|im_start|>tool") == 1


def test_trimmed_weights_and_kinds_are_those_of_the_turn(tokenizer, template):
    """A trimmed example is weighed like any other: message, row, kind."""
    messages = list(LONG.messages)
    messages[6] = A("third answer", weight=0.5)
    row = dataclasses.replace(LONG, messages=tuple(messages), weight=2.0, task="sums", source=3)
    limit = computed(made(row, tokenizer, template).examples[-1]) - 1
    pairs = made(row, tokenizer, template, limit=limit, too_long="trim-context", terminator=3.0)
    example = pairs.examples[-1]
    assert example.cut_tokens > 0
    assert example.weights.tolist() == [1.0] * (len(example.weights) - 1) + [3.0]
    assert (example.turn, example.task, example.source, example.origin) == (2, "sums", 3, "a:1")


def test_every_token_is_accounted_for(tokenizer, template):
    """Prompt, answer and cut tokens of what was made and dropped are those of the untrimmed examples, to the token."""
    rows = [dataclasses.replace(LONG, origin=f"a:{i}", messages=(*LONG.messages[:5], U("x " * i), A("y " * i)))
            for i in range(1, 40, 3)]  # fmt: skip
    whole = sum(computed(example) + 1 for example in made(rows, tokenizer, template).examples)
    for too_long in ("drop", "trim-context"):
        pairs = made(rows, tokenizer, template, limit=90, too_long=too_long)
        kept = sum(computed(example) + 1 + example.cut_tokens for example in pairs.examples)
        gone = sum(dropped.prompt_tokens + dropped.answer_tokens for dropped in pairs.dropped)
        assert kept + gone == whole
        assert all(computed(example) <= 90 for example in pairs.examples)
        assert pairs.dropped


def test_pairs_that_the_user_tokenised_are_taken_as_they_are(tokenizer, template):
    """Ids and weights of the row, times the row's weight; no template, no tokenizer has a say."""
    pair = TokenPair((5, 6, 7), (8, 9, 10), (0.0, 1.0, 0.5))
    row = Conversation((), "a:1", task="t", weight=2.0, first_turn=1, source=4, pair=pair)
    (example,) = made(row, tokenizer, template).examples
    assert (example.prompt_tokens.tolist(), example.answer_tokens.tolist()) == ([5, 6, 7], [8, 9, 10])
    assert example.weights.tolist() == [0.0, 2.0, 1.0]
    assert (example.origin, example.turn, example.task, example.source) == ("a:1", 1, "t", 4)
    assert [KINDS[kind] for kind in example.kinds] == ["answer", "answer", "terminator"]


@pytest.mark.parametrize(
    ("pair", "place", "rule"),
    [
        (TokenPair((), (8,), (1.0,)), "a:1: prompt_tokens", "no-answer"),
        (TokenPair((5,), (), ()), "a:1: answer_tokens", "no-answer"),
        (TokenPair((5, 10_000_000), (8,), (1.0,)), "a:1: prompt_tokens", "token-id"),
        (TokenPair((5,), (8, -1), (1.0, 1.0)), "a:1: answer_tokens", "token-id"),
        (TokenPair((5,), (8, 9), (1.0, 0.0)), "a:1: weights", "weights-terminator"),
    ],
)
def test_wrong_pairs_are_refused(tokenizer, template, pair, place, rule):
    """An empty side, an id that the tokenizer does not have, an end without weight: problems with their place."""
    good = Conversation((), "a:2", pair=TokenPair((5,), (8,), (1.0,)))
    pairs = made([Conversation((), "a:1", pair=pair), good], tokenizer, template)
    assert [example.origin for example in pairs.examples] == ["a:2"]
    assert [(problem.place, problem.rule) for problem in pairs.problems] == [(place, rule)]


@pytest.mark.parametrize("id_", [0, 1])
def test_last_id_of_the_vocabulary_is_taken_and_the_next_is_not(tokenizer, template, id_):
    """Ids run from 0 to the highest, inclusive."""
    last = tokenizer.vocab_size - 1 + id_
    good = Conversation((), "a:2", pair=TokenPair((5,), (8,), (1.0,)))
    row = Conversation((), "a:1", pair=TokenPair((0,), (last,), (1.0,)))
    assert len(made([good, row], tokenizer, template).problems) == id_


def test_tokenised_pairs_can_be_too_long(tokenizer, template):
    """The limit holds for them too; there is nothing to trim."""
    row = Conversation((), "a:1", pair=TokenPair((5,) * 20, (8,) * 5, (1.0,) * 5))
    assert len(made(row, tokenizer, template, limit=24, too_long="trim-context").examples) == 1
    pairs = made(row, tokenizer, template, limit=23, too_long="trim-context")
    assert (pairs.examples, [dropped.turn for dropped in pairs.dropped]) == ([], [0])


def test_tokenised_pairs_that_were_changed_are_noticed(tokenizer, template):
    """The certificate compares them with the row, id by id."""
    row = Conversation((), "a:1", pair=TokenPair((5, 6), (8, 9), (1.0, 1.0)))
    (example,) = made(row, tokenizer, template).examples
    for change, rule in (
        ({"prompt_tokens": np.array([5, 7], np.int32)}, "prompt-differs"),
        ({"answer_tokens": np.array([8, 8], np.int32)}, "answer-differs"),
    ):
        wrong = dataclasses.replace(example, **change)
        problems = certify([wrong], [row], tokenizer, template, {})[1]
        assert rule in {problem.rule for problem in problems}


def test_merged_boundary_is_counted_and_the_prompt_kept(tokenizer):
    """Where the tokenizer would join the end of the prompt and the start of the answer, the prompt is the server's."""
    template = Template(SPACED, {}, place="t")
    row = Conversation((U("x"), A("Hello world")), "a:1")
    pairs = made(row, tokenizer, template)
    (example,) = pairs.examples
    assert (pairs.merged_boundaries, pairs.notes) == (1, {"merged_boundaries": 1})
    assert example.prompt_tokens.tolist() == tokenizer.encode("user: x<|im_end|>\nassistant: ")
    assert example.prompt_tokens.tolist() == served_prompt(row.messages[:1], tokenizer, template).tolist()
    assert example.answer_tokens.tolist() == tokenizer.encode("Hello world<|im_end|>")


def test_later_branches_know_their_turn(tokenizer, template):
    """first_turn: a branch of a tree of messages numbers its answers after those of the branches before it."""
    row = Conversation(LONG.messages, "a:1", first_turn=4)
    assert [example.turn for example in made(row, tokenizer, template).examples] == [4, 5, 6]


def test_later_branches_know_their_turn_where_each_is_rendered(tokenizer):
    """A template that counts the messages is followed turn by turn; the numbers are the same."""
    template = Template("{% set n = messages | length %}" + PLAIN, {}, place="t")
    row = Conversation(LONG.messages, "a:1", first_turn=4)
    assert [example.turn for example in made(row, tokenizer, template).examples] == [4, 5, 6]


def test_tools_and_arguments_of_the_row_reach_every_prompt(tokenizer):
    """Each prompt is what `served_prompt` gives for the same tools and template arguments."""
    source = "{{ tools | tojson if tools }}{{ 'kind ' if mood == 'kind' }}" + PLAIN
    template = Template(source, {}, place="t")
    tools = ({"type": "function", "function": {"name": "f"}},)
    row = dataclasses.replace(LONG, tools=tools, template_args={"mood": "kind"})
    for turn, example in enumerate(made(row, tokenizer, template).examples):
        before = row.messages[: 2 + 2 * turn]
        expected = served_prompt(before, tokenizer, template, tools, {"mood": "kind"})
        assert example.prompt_tokens.tolist() == expected.tolist()
        assert tokenizer.decode(example.prompt_tokens).startswith('[{"type"')


def test_examples_of_a_row_with_a_problem_are_not_used(tokenizer):
    """One bad turn spoils its row, and no other."""
    source = PLAIN.replace("{{ m.content }}", "{{ m.content | replace('bad', 'good') }}")
    bad = Conversation((U("x"), A("fine"), U("y"), A("bad")), "a:1")
    good = dataclasses.replace(LONG, origin="a:2")
    pairs = made([bad, good], tokenizer, Template(source, {}, place="t"))
    assert [example.origin for example in pairs.examples] == ["a:2"] * 3
    assert [problem.place for problem in pairs.problems] == ["a:1: messages[3]"]


def test_default_system_prompt_of_the_template_is_served(tokenizer):
    """What the template adds by itself is in the prompt, as on the server."""
    (example,) = made(Conversation((U("x"), A("y")), "a:1"), tokenizer, Template(CHATML, {}, place="t")).examples
    assert "You are a helpful assistant." in tokenizer.decode(example.prompt_tokens)


def test_a_template_that_hangs_on_one_row_names_the_row(chatml, monkeypatch):
    """A template that passes its trial and then computes for ever on a row of the user's is stopped, and says where."""
    loops = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    slow = "{% if 'SLOW' in messages[0].content %}" + loops + "{% endif %}"
    template = Template(slow + CHATML, {"bos_token": "<s>", "eos_token": "</s>"}, place="mine.jinja")
    rows = [
        Conversation((Message("user", text), Message("assistant", "ok")), f"a:{n}")
        for n, text in enumerate(("x", "SLOW", "y"))
    ]
    monkeypatch.setattr("instil.chat.pairs.RENDER_LIMIT_S", 0.3)
    with pytest.raises(TemplateError, match=r"mine\.jinja: the template used more than 0.3 s at a:1;"):
        make_examples(rows, load_tokenizer(chatml), template)
