"""What a token of an answer counts is message times row times kind, and an example can be made to count as one."""

from __future__ import annotations

import numpy as np
import pytest
from chat_samples import CHATML

from instil.chat.pairs import make_examples
from instil.chat.targets import ANSWER, PROMPT, REASONING, TERMINATOR, TOOL_CALL, Targets, spans, weigh
from instil.chat.template import Template
from instil.chat.tokenizer import load_tokenizer
from instil.chat.turns import ChatOptions
from instil.types import KINDS, Conversation, Example, Message

U, A = (lambda text, role=role, **fields: Message(role, text, fields) for role in ("user", "assistant"))
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
SOURCE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(chatml):
    return load_tokenizer(chatml)


def examples_of(tokenizer, row, source=SOURCE, **targets):
    pairs = make_examples([row], tokenizer, Template(source, {}, place="t"), ChatOptions(targets=Targets(**targets)))
    assert pairs.problems == []
    return pairs.examples


def kinds_by_text(tokenizer, example):
    """The text of each run of tokens of one kind."""
    runs, start, kinds = [], 0, example.kinds.tolist()
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start]:
            runs.append((KINDS[kinds[start]], tokenizer.decode(example.answer_tokens[start:i])))
            start = i
    return runs


def example(weights, kinds, prompt=(1, 2), answer=None, turn=0):
    answer = list(range(10, 10 + len(weights))) if answer is None else answer
    return Example(
        np.array(prompt, np.int32), np.array(answer, np.int32), np.array(weights, np.float32), "a:1", turn,
        kinds=np.array(kinds, np.int8),
    )  # fmt: skip


def test_message_row_and_kind_weights_multiply(tokenizer):
    """0.5 (message) x 3 (row) x the weight of the kind, token by token, by hand."""
    row = Conversation((U("x"), A("yes", reasoning_content="why", weight=0.5)), "a:1", weight=3.0)
    (found,) = examples_of(tokenizer, row, reasoning=0.5, answer=2.0, terminator=4.0)
    runs = kinds_by_text(tokenizer, found)
    assert runs == [("reasoning", "<think>\nwhy\n</think>\n\n"), ("answer", "yes"), ("terminator", "<|im_end|>")]
    counts = [len(tokenizer.encode(text)) for _, text in runs]
    assert found.weights.tolist() == [0.75] * counts[0] + [3.0] * counts[1] + [6.0] * counts[2]


def test_all_ones_by_default(tokenizer):
    """Without any weights each token of an answer counts one, and none of the prompt is in it."""
    (found,) = examples_of(tokenizer, Conversation((U("x"), A("yes")), "a:1"))
    assert found.weights.tolist() == [1.0] * len(found.answer_tokens)
    assert found.kinds.tolist() == [ANSWER] * (len(found.answer_tokens) - 1) + [TERMINATOR]


def test_loss_per_example_sums_to_the_weight_of_the_message():
    """per=example: 2 + 1 tokens of weight 0.5 become parts of 0.5, in the proportions of their kinds."""
    given = [example([0.5, 0.5, 0.5], [ANSWER, ANSWER, TERMINATOR]), example([3.0, 3.0], [REASONING, TERMINATOR])]
    one, two = weigh(given, Targets(per="example"))
    assert one.weights.tolist() == pytest.approx([0.5 / 3] * 3)
    assert two.weights.tolist() == pytest.approx([1.5, 1.5])
    one, two = weigh(given, Targets(per="example", reasoning=0.0, terminator=2.0))
    assert one.weights.tolist() == pytest.approx([0.125, 0.125, 0.25])  # 1 : 1 : 2 of 0.5
    assert two.weights.tolist() == pytest.approx([0.0, 3.0])


def test_loss_per_example_of_long_and_short_answers_is_equal(tokenizer):
    """per=example: an answer of one word and one of fifty count the same."""
    row = Conversation((U("x"), A("yes"), U("y"), A("no " * 50)), "a:1")
    short, long = examples_of(tokenizer, row, per="example")
    assert short.weights.sum() == pytest.approx(1) == long.weights.sum()
    assert len(long.weights) > 10 * len(short.weights)


def test_last_turn_only(tokenizer):
    """turns=last: the last answer that counts, with its number in the row."""
    messages = (U("a"), A("one"), U("b"), A("two"), U("c"), A("three", weight=0))
    (found,) = examples_of(tokenizer, Conversation(messages, "a:1"), turns="last")
    assert (found.turn, tokenizer.decode(found.answer_tokens)) == (1, "two<|im_end|>")
    assert "one" in tokenizer.decode(found.prompt_tokens)


def test_everything_learns_each_token_once(tokenizer):
    """turns=everything: of a conversation with two answers every token is a target once, but the first of all."""
    row = Conversation((U("Hi"), A("yes"), U("y"), A("no")), "a:1")
    first, second = examples_of(tokenizer, row, turns="everything")
    text = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\ny<|im_end|>\n"
        "<|im_start|>assistant\nno<|im_end|>"
    )
    ids = tokenizer.encode(text)
    assert first.prompt_tokens.tolist() == ids[:1]
    assert first.answer_tokens.tolist() == tokenizer.encode(text[: text.index("yes")] + "yes<|im_end|>")[1:]
    assert second.prompt_tokens.tolist() == ids[: 1 + len(first.answer_tokens)]
    assert [*first.answer_tokens.tolist(), *second.answer_tokens.tolist()] == ids[1:]
    assert (first.weights.tolist(), second.weights.tolist()) == (
        [1.0] * len(first.weights),
        [1.0] * len(second.weights),
    )
    answers = len(tokenizer.encode("yes")) + len(tokenizer.encode("no"))
    counts = np.bincount(np.concatenate([first.kinds, second.kinds]), minlength=len(KINDS)).tolist()
    assert counts == [answers, 0, 0, 2, len(ids) - 1 - answers - 2]


def test_everything_with_a_history_that_is_rewritten(tokenizer):
    """Where older reasoning leaves the prompt, the second example learns from where its tokens differ."""
    source = SOURCE.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    row = Conversation((U("Hi"), A("yes", reasoning_content="why"), U("y"), A("no")), "a:1")
    first, second = examples_of(tokenizer, row, source, turns="everything")
    one = [*first.prompt_tokens.tolist(), *first.answer_tokens.tolist()]
    two = [*second.prompt_tokens.tolist(), *second.answer_tokens.tolist()]
    shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert len(second.prompt_tokens) == shared
    assert tokenizer.decode(second.prompt_tokens) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert second.kinds.tolist().count(PROMPT) == len(two) - shared - len(tokenizer.encode("no<|im_end|>"))


def test_everything_counts_shared_prefixes_of_hand_made_examples_once():
    """Tokens 1 2 3 | 4 5 and 1 2 3 4 9 | 6: the second learns 9 and 6, as 2 to 5 have been learnt."""
    given = [example([1, 1], [0, 3], (1, 2, 3), (4, 5)), example([2], [3], (1, 2, 3, 4, 9), (6,), 1)]
    one, two = weigh(given, Targets(turns="everything"))
    assert (one.prompt_tokens.tolist(), one.answer_tokens.tolist()) == ([1], [2, 3, 4, 5])
    assert one.kinds.tolist() == [PROMPT, PROMPT, ANSWER, TERMINATOR]
    assert (two.prompt_tokens.tolist(), two.answer_tokens.tolist()) == ([1, 2, 3, 4], [9, 6])
    assert (two.weights.tolist(), two.kinds.tolist()) == ([2.0, 2.0], [PROMPT, TERMINATOR])


def test_everything_keeps_an_answer_whose_beginning_was_learnt():
    """Two answers to one prompt that begin alike are both learnt whole: a shared beginning is two lessons, not one."""
    given = [example([1, 1], [0, 3], (1, 2), (4, 5)), example([1, 1], [0, 3], (1, 2), (4, 6), 1)]
    _, two = weigh(given, Targets(turns="everything"))
    assert (two.prompt_tokens.tolist(), two.answer_tokens.tolist()) == ([1, 2], [4, 6])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (A("yes"), [("answer", "yes"), ("terminator", "<|im_end|>")]),
        (A("yes", reasoning_content="why"),
         [("reasoning", "<think>\nwhy\n</think>\n\n"), ("answer", "yes"), ("terminator", "<|im_end|>")]),
        (A("<think>\nwhy\n</think>\n\nyes"),
         [("reasoning", "<think>\nwhy\n</think>\n\n"), ("answer", "yes"), ("terminator", "<|im_end|>")]),
        (A("", tool_calls=[CALL]), [("tool_call", "<call>f</call>"), ("terminator", "<|im_end|>")]),
        (A("I look.", tool_calls=[CALL]),
         [("answer", "I look."), ("tool_call", "<call>f</call>"), ("terminator", "<|im_end|>")]),
        (A("", reasoning_content="why", tool_calls=[CALL]),
         [("reasoning", "<think>\nwhy\n</think>\n\n"), ("tool_call", "<call>f</call>"), ("terminator", "<|im_end|>")]),
        (A("No tag </think> here"), [("answer", "No tag </think> here"), ("terminator", "<|im_end|>")]),
        (A("Write <think> first"), [("answer", "Write <think> first"), ("terminator", "<|im_end|>")]),
        (A("<thinking>why</thinking>yes"),
         [("reasoning", "<thinking>why</thinking>"), ("answer", "yes"), ("terminator", "<|im_end|>")]),
        (A(""), [("terminator", "<|im_end|>")]),
    ],
)  # fmt: skip
def test_kinds_of_an_answer(tokenizer, message, expected):
    """Reasoning with its tags, the answer, calls and the end: every token has one kind, and the runs spell the text."""
    (found,) = examples_of(tokenizer, Conversation((U("x"), message), "a:1"))
    assert kinds_by_text(tokenizer, found) == expected
    assert len(found.kinds) == len(found.answer_tokens) == len(found.weights)


def test_kind_of_a_token_that_spans_two(tokenizer):
    """Kinds are decided by a token's first character: no token is lost, none counted twice."""
    answer = tokenizer.encode("ab<|im_end|>")
    from instil.chat.targets import kinds_of

    for cut in range(3):
        kinds = kinds_of(answer, 1, [(REASONING, 0, cut)], tokenizer)
        starts = [len(tokenizer.decode(answer[:i])) for i in range(len(answer) - 1)]
        assert kinds.tolist() == [REASONING if start < cut else ANSWER for start in starts] + [TERMINATOR]


def test_reasoning_in_a_channel_that_the_prompt_opened():
    """The answer begins inside the channel: all up to its closing tag is reasoning."""
    body = "why\n</think>\n\nyes"
    assert spans(A("yes"), "<|im_start|>assistant\n<think>\n", body) == [(REASONING, 0, body.index("yes"))]


def test_call_before_the_content():
    """Gemma writes the calls first and the text after them."""
    body = "<call>f</call>I look."
    assert spans(A("I look.", tool_calls=[CALL]), "", body) == [(TOOL_CALL, 0, body.index("I look."))]


def test_unicode_is_cut_at_whole_characters(tokenizer):
    """Reasoning in characters of several bytes: kinds change where the tag ends, not a byte before or after."""
    (found,) = examples_of(tokenizer, Conversation((U("x"), A("👋🏽 да", reasoning_content="多字节 👋🏽")), "a:1"))
    assert kinds_by_text(tokenizer, found) == [
        ("reasoning", "<think>\n多字节 👋🏽\n</think>\n\n"), ("answer", "👋🏽 да"), ("terminator", "<|im_end|>")
    ]  # fmt: skip


def test_weight_of_a_kind_can_be_nothing(tokenizer):
    """answer=0: only the end is learnt; a row of weight 0 gives nothing at all."""
    (found,) = examples_of(tokenizer, Conversation((U("x"), A("yes")), "a:1"), CHATML, answer=0.0)
    assert found.weights.tolist() == [0.0] * (len(found.weights) - 1) + [1.0]
    assert examples_of(tokenizer, Conversation((U("x"), A("yes")), "a:1", weight=0.0)) == []
