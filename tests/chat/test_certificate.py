"""The certificate counts what is there, and each kind of wrong example is noticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from chat_samples import CHATML, LLAMA3, SPACED

from instil.chat.certificate import certify
from instil.chat.pairs import make_examples
from instil.chat.targets import Targets
from instil.chat.template import Template, load_template
from instil.chat.tokenizer import load_tokenizer
from instil.chat.turns import ChatOptions
from instil.types import Conversation, Example, Message

U, A = (lambda text, role=role: Message(role, text) for role in ("user", "assistant"))
ROWS = [
    Conversation((U("Hello world"), A("[[1,2]]"), U("Again?"), A("The answer 👋🏽\nis yes.")), "train.jsonl:1"),
    Conversation((Message("system", "Be kind."), U("Hi"), A("Hello")), "train.jsonl:2"),
]


def int32(*parts):
    return np.concatenate([np.atleast_1d(np.asarray(part, dtype=np.int32)) for part in parts])


def pair(example: Example, prompt, answer) -> Example:
    """The example with other tokens, and weights and kinds that fit them."""
    weights, kinds = np.ones(len(answer), dtype=np.float32), np.zeros(len(answer), dtype=np.int8)
    kinds[-1] = 3
    return dataclasses.replace(
        example, prompt_tokens=int32(prompt), answer_tokens=int32(answer), weights=weights, kinds=kinds
    )


@pytest.fixture(scope="module")
def setting(make_folder):
    """A tokenizer with a BOS-writing template, and the right examples."""
    folder = make_folder(LLAMA3)
    tokenizer, template = load_tokenizer(folder), load_template(folder, None)
    return tokenizer, template, make_examples(ROWS, tokenizer, template).examples


def rules(setting, *examples):
    tokenizer, template, _ = setting
    return {problem.rule for problem in certify(examples, ROWS, tokenizer, template, {})[1]}


def test_right_examples_are_certified(folder):
    """Examples as the chat stage makes them have no fault, and the certificate counts them."""
    tokenizer, template = load_tokenizer(folder), load_template(folder, None)
    pairs = make_examples(ROWS, tokenizer, template)
    certificate, problems = certify(pairs.examples, ROWS, tokenizer, template, {"train.jsonl": "ab12"})
    answers = [example.answer_tokens for example in pairs.examples]
    end, total = {int(answer[-1]) for answer in answers}, sum(map(len, answers))
    terminator = {"text": tokenizer.decode(list(end)), "id": min(end), "ids": list(end),
                  "source": "the template writes it at the end of the turn"}  # fmt: skip
    assert problems == []
    assert 2 <= certificate["by_library"] <= 3  # the first answers of the first rows, and others here and there
    assert certificate == {
        "examples": 3,
        "checked": 3,
        "by_edit": 3,
        "by_rendering": 0,
        "as_given": 0,
        "by_library": certificate["by_library"],
        "prompt_tokens": sum(len(example.prompt_tokens) for example in pairs.examples),
        "answer_tokens": total,
        "bos_examples": 3 * (tokenizer.bos_id() in [int(example.prompt_tokens[0]) for example in pairs.examples]),
        "target_tokens": total,
        "target_kinds": {"answer": total - 3, "reasoning": 0, "tool_call": 0, "terminator": 3, "prompt": 0},
        "weight_sum": float(total),
        "terminator": terminator,
        "terminators": [terminator],
        "lossy_texts": [],
        "generation_blocks": {"agree": 0, "differ": 0, "first": []},
        "template_sha256": template.digest,
        "tokenizer_sha256": tokenizer.digest,
        "data_sha256": {"train.jsonl": "ab12"},
        "uses_date": False,
    }


def test_dropped_terminator_is_noticed(setting):
    """An answer without its end token teaches the model never to stop."""
    example = setting[2][0]
    found = rules(setting, pair(example, example.prompt_tokens, example.answer_tokens[:-1]))
    assert found == {"answer-differs", "no-terminator"}


def test_missing_first_token_is_noticed(setting):
    """An answer that begins one token late (or one early) is not the answer."""
    example = setting[2][1]
    prompt, answer = example.prompt_tokens, example.answer_tokens
    assert "answer-differs" in rules(setting, pair(example, prompt, answer[1:]))
    assert rules(setting, pair(example, int32(prompt, answer[0]), answer[1:])) >= {"prompt-differs", "answer-differs"}


def test_trained_header_is_noticed(setting):
    """The header of the answer is the server's to write, not the model's."""
    example = setting[2][1]
    prompt, answer = example.prompt_tokens, example.answer_tokens
    assert rules(setting, pair(example, prompt[:-4], int32(prompt[-4:], answer))) == {
        "prompt-differs",
        "answer-differs",
    }


def test_missing_history_is_noticed(setting):
    """The prompt of the second turn holds the first answer."""
    first, second = setting[2][:2]
    start = len(first.prompt_tokens)
    shorter = np.delete(second.prompt_tokens, np.arange(start, start + len(first.answer_tokens) - 1))
    assert rules(setting, pair(second, shorter, second.answer_tokens)) == {"prompt-differs"}


def test_user_text_as_answer_is_noticed(setting):
    """What the user wrote is never a target."""
    tokenizer, _, examples = setting
    user = tokenizer.encode("Hello world<|eot_id|>")
    assert rules(setting, pair(examples[0], examples[0].prompt_tokens, user)) == {"answer-differs", "content-lost"}
    swapped = pair(examples[0], examples[2].prompt_tokens, examples[2].answer_tokens)
    assert rules(setting, swapped) == {"prompt-differs", "answer-differs", "content-lost"}


def test_doubled_bos_is_noticed(setting):
    """One BOS begins a prompt: two are what a tokenizer adds on top of a template."""
    example = setting[2][0]
    doubled = pair(example, int32(example.prompt_tokens[0], example.prompt_tokens), example.answer_tokens)
    assert rules(setting, doubled) == {"prompt-differs", "double-bos"}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda weights: weights[:-1], "weights-length"),
        (lambda weights: np.append(weights[:-1], np.float32(0)), "weights-terminator"),
        (lambda weights: -weights, "weights-value"),
        (lambda weights: weights * np.float32("nan"), "weights-value"),
    ],
)
def test_wrong_weights_are_noticed(setting, change, rule):
    """Weights are aligned with the answer, count something, and never leave out its end."""
    example = setting[2][0]
    assert rule in rules(setting, dataclasses.replace(example, weights=change(example.weights)))


def test_zero_weights_need_a_policy(setting):
    """A token of weight 0 inside an answer is no target; it is allowed where the policy for its kind says so."""
    tokenizer, template, (example, *_) = setting
    weights, kinds = example.weights.copy(), example.kinds.copy()
    weights[0], kinds[0] = 0, 1
    wrong = dataclasses.replace(example, weights=weights)
    assert rules(setting, wrong) == {"weights-policy"}
    right = dataclasses.replace(wrong, kinds=kinds)
    options = ChatOptions(targets=Targets(reasoning=0))
    certificate, problems = certify([right], ROWS, tokenizer, template, {}, options)
    assert problems == []
    assert certificate["target_tokens"] == certificate["answer_tokens"] - 1
    assert certificate["weight_sum"] == certificate["answer_tokens"] - 1


def test_kinds_are_those_of_the_weights(setting):
    """An answer whose last token is not called its terminator, or that has too few kinds, is noticed."""
    example = setting[2][0]
    assert rules(setting, dataclasses.replace(example, kinds=example.kinds[:-1])) == {"weights-kinds"}
    assert rules(setting, dataclasses.replace(example, kinds=0 * example.kinds)) == {"weights-kinds"}


@pytest.mark.parametrize("change", [{"origin": "other.jsonl:1"}, {"turn": 2}, {"turn": -1}])
def test_example_without_a_source_is_noticed(setting, change):
    """An example says which turn of which row it is, and that turn exists."""
    assert rules(setting, dataclasses.replace(setting[2][0], **change)) == {"no-source"}


def test_another_template_is_noticed(make_folder):
    """Examples made with one template are not certified with another."""
    folder = make_folder(CHATML)
    tokenizer, template = load_tokenizer(folder), load_template(folder, None)
    examples = make_examples(ROWS, tokenizer, template).examples
    other = Template(CHATML.replace("helpful", "kind"), {}, place="other")
    places = [problem.place for problem in certify(examples, ROWS, tokenizer, other, {})[1]]
    assert places == ["train.jsonl:1: turn 0", "train.jsonl:1: turn 1"]  # the third row has its own system message


def test_typed_control_token_that_became_one_is_noticed(setting):
    """A typed control token is text, or the row is refused: what treats it as a control token is not certified."""
    tokenizer, template, _ = setting
    row = Conversation((U("x"), A("stop <|eot_id|> here")), "a:1")
    prompt = tokenizer.encode(template.render(row.messages[:1], generation_prompt=True))
    answer = tokenizer.encode("stop <|eot_id|> here<|eot_id|>")
    example = pair(Example(int32(prompt), int32(answer), np.ones(0, np.float32), "a:1", 0), prompt, answer)
    for options in (ChatOptions(), ChatOptions(control_text="reject")):
        _, problems = certify([example], [row], tokenizer, template, {}, options)
        assert {problem.rule for problem in problems} == {"control-token", "ambiguous-terminator"}
    (right,) = make_examples([row], tokenizer, template).examples
    assert certify([right], [row], tokenizer, template, {})[1] == []
    served = ChatOptions(
        control_text="as-served"
    )  # the user asked for control tokens, but no server goes on after this one
    _, problems = certify([example], [row], tokenizer, template, {}, served)
    assert {problem.rule for problem in problems} == {"ambiguous-terminator"}


def test_merged_boundaries_are_counted_and_checked(make_folder):
    """Where a token spans the boundary the text is compared, and a lost token is still noticed."""
    folder = make_folder(SPACED)
    tokenizer, template = load_tokenizer(folder), load_template(folder, None)
    row = Conversation((U("x"), A("Hello world")), "a:1")
    (example,) = make_examples([row], tokenizer, template).examples
    assert make_examples([row], tokenizer, template).notes == {"merged_boundaries": 1}
    assert certify([example], [row], tokenizer, template, {})[1] == []
    late = pair(example, example.prompt_tokens, example.answer_tokens[1:])
    assert "answer-differs" in {problem.rule for problem in certify([late], [row], tokenizer, template, {})[1]}


def test_token_that_swallows_whitespace_is_no_fault(make_folder):
    """A header token that swallows the space after it (as in Phi-3) takes it from the answer too, and is certified."""
    header = {"content": "<|assistant|>", "rstrip": True, "special": True, "normalized": False}
    source = SPACED.replace("assistant: {%", "<|assistant|>\n{%").replace(
        "{{ message.role }}: ", "<|{{ message.role }}|>\n"
    )
    tokenizer = load_tokenizer(make_folder(added_tokens_decoder={"900": header}))
    template = Template(source, {}, place="t")
    row = Conversation((U("x"), A("  Hello")), "a:1")
    (example,) = make_examples([row], tokenizer, template).examples
    assert tokenizer.decode(example.answer_tokens) == "Hello<|im_end|>"
    assert certify([example], [row], tokenizer, template, {})[1] == []
