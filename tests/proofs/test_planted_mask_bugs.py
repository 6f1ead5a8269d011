"""The certificate notices every way in which pipelines are known to teach the wrong tokens: each bug is planted here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from real_chats import (
    TOOLS,
    call,
    control_tokens,
    result,
    said,
    sources,
    template,
    write_sentencepiece,
    write_tokenizer,
)

from instil.chat import ids
from instil.chat.certificate import certify
from instil.chat.pairs import make_examples
from instil.chat.targets import Targets
from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import ChatOptions
from instil.errors import InstilError
from instil.types import Conversation, Example

from chat_samples import CONTROL, TEMPLATES  # isort: skip  (real_chats makes it importable)

SYSTEM, USER, ANSWER = "Be kind.", "Hello world", "[[1,2],[3,4]]"
# Reasoning of older turns is removed, and the prompt of an answer opens a channel, as in many reasoning models.
REASONS = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content and loop.last %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if thinking is defined and not thinking %}
</think>
{% endif %}{% endif %}"""
CALLS = """{{ bos_token }}{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OWN = {**TEMPLATES, "reasons": REASONS, "calls": CALLS}
REAL = (
    "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "GLM-4.6", "GLM-4.7-Flash", "openai-gpt-oss-120b",
    "mistralai-Mistral-Nemo-Instruct-2407", "google-gemma-4-31B-it", "Mistral-Small-3.2-24B-Instruct-2506",
    "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "Apertus-8B-Instruct",
)  # fmt: skip
HALF = ChatOptions(targets=Targets(answer=0.5, reasoning=0.25))  # so that the weights of an answer differ


@dataclass(frozen=True)
class Case:
    """A template and a tokenizer, rows, and the right examples of those rows that the template takes."""

    name: str
    tokenizer: Tokenizer
    template: Template
    rows: dict[str, Conversation]
    right: dict[tuple[str, int], Example]

    def text(self, messages: Any, ask: bool = True, tools: Any = ()) -> str:
        return self.template.render(messages, tools=tools, generation_prompt=ask)

    def ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text), np.int32)

    def spelt(self, ids: Any) -> str:
        return self.tokenizer.decode(ids)

    def end(self, example: Example) -> np.ndarray:
        """The tokens of the terminator, which all these tokenizers know as one."""
        return example.answer_tokens[-1:]


def rows_for(terminator: str) -> list[Conversation]:
    return [
        Conversation(
            (said("system", SYSTEM), said("user", USER), said("assistant", ANSWER), said("user", "Again? 👋🏽"),
             said("assistant", "(yes. The answer)")), "two",
        ),
        Conversation((said("user", "Hi"), said("assistant", "Hello, it is well")), "one"),
        Conversation((said("user", "x"), said("assistant", "Hello world")), "merged"),
        Conversation((said("user", "x"), said("assistant", f"stop {terminator} here")), "typed"),
        Conversation(
            (said("user", "Who?"), said("assistant", "", tool_calls=[call("Ada")]), result("Ada Lovelace"),
             said("assistant", "It is Ada.")), "tools", TOOLS,
        ),
        Conversation(
            (said("user", "Why?"), said("assistant", "So.", reasoning_content="Because of that"), said("user", "Oh?"),
             said("assistant", "Yes.", reasoning_content="I think so")), "thought",
        ),
    ]  # fmt: skip


def case(name: str, source: str, tokenizer: Tokenizer) -> Case:
    loaded = template(source)
    end = make_examples(rows_for("")[1:2], tokenizer, loaded).terminators[0].text
    rows, right = {}, {}
    for row in rows_for(end):
        try:
            pairs = make_examples([row], tokenizer, loaded)
        except InstilError:
            continue
        if not pairs.problems:
            rows[row.origin] = row
            right.update({(example.origin, example.turn): example for example in pairs.examples})
    return Case(name, tokenizer, loaded, rows, right)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("own"), CONTROL)
    pieces = write_sentencepiece(tmp_path_factory.mktemp("pieces"), CONTROL)
    return [case(name, source, tokenizer) for name, source in OWN.items()] + [
        case(f"{name} in pieces", OWN[name], pieces) for name in ("chatml", "mistral", "reasons")
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    found = sources()
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("real"), control_tokens())
    return [case(name, found[name], tokenizer) for name in REAL]


def pair(example: Example, prompt: Any, answer: Any) -> Example:
    """The example with other tokens; each counts one, and the last is the terminator, as a pipeline would have it."""
    kinds = np.zeros(len(answer), np.int8)
    kinds[-1:] = 3
    return dataclasses.replace(
        example, prompt_tokens=np.asarray(prompt, np.int32), answer_tokens=np.asarray(answer, np.int32),
        weights=np.ones(len(answer), np.float32), kinds=kinds,
    )  # fmt: skip


def whole(example: Example) -> np.ndarray:
    return np.concatenate([example.prompt_tokens, example.answer_tokens])


Planted = Example | None
Bug = Callable[[Case], Planted | Iterator[Planted]]


def each(change: Callable[[Case, Example], Planted]) -> Callable[[Case], Iterator[Planted]]:
    """The same change made to every right example in turn."""

    def planted(case: Case) -> Iterator[Planted]:
        for example in case.right.values():
            yield change(case, example)

    return planted


def at(origin: str, turn: int = 0) -> Callable[[Callable[[Case, Example], Planted]], Bug]:
    """A change that makes sense for one example only."""

    def choose(change: Callable[[Case, Example], Planted]) -> Bug:
        return lambda case: change(case, case.right[origin, turn]) if (origin, turn) in case.right else None

    return choose


def move(example: Example, by: int) -> Example:
    """The boundary between prompt and answer moved."""
    tokens, start = whole(example), len(example.prompt_tokens) + by
    return pair(example, tokens[:start], tokens[start:])


def without(case: Case, example: Example, keep: Callable[[Any], bool], tools: bool = True) -> Planted:
    """A prompt made of fewer messages, or without the tools."""
    row = case.rows[example.origin]
    answers = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    before = [message for message in row.messages[: answers[example.turn]] if keep(message)]
    prompt = case.ids(case.text(before, True, row.tools if tools else ()))
    same = prompt.tolist() == example.prompt_tokens.tolist()  # a template that does not write it
    return None if same else pair(example, prompt, example.answer_tokens)


def header_of(case: Case, example: Example) -> int:
    """How many tokens of the prompt only the generation prompt writes."""
    row = case.rows[example.origin]
    answers = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    before = row.messages[: answers[example.turn]]
    asked, told = case.text(before, True, row.tools), case.text(before, False, row.tools)
    return len(case.ids(asked)) - len(case.ids(told)) if asked.startswith(told) else 0


def header_trained(case: Case, example: Example) -> Planted:
    n = header_of(case, example)
    return move(example, -n) if n else None


def header_twice(case: Case, example: Example) -> Planted:
    n = header_of(case, example)
    return pair(example, example.prompt_tokens, [*example.prompt_tokens[-n:], *example.answer_tokens]) if n else None


def stored_header_twice(case: Case, example: Example) -> Planted:
    """The header as it stands in the history, after a prompt that has it (and may have opened a channel after it)."""
    row = case.rows[example.origin]
    index = [i for i, message in enumerate(row.messages) if message.role == "assistant"][example.turn]
    asked, told = case.text(row.messages[:index], True, row.tools), case.text(row.messages[:index], False, row.tools)
    stored = case.text(row.messages[: index + 1], False, row.tools)
    if not asked.startswith(told) or row.messages[index].fields:
        return None
    header = stored[len(told) :].partition(row.messages[index].content)[0]
    return pair(example, example.prompt_tokens, [*case.ids(header), *example.answer_tokens]) if header.strip() else None


def cut_from_the_whole(case: Case, example: Example) -> Planted:
    """All turns cut out of the one rendering of the whole conversation, where a server would see another history."""
    row = case.rows[example.origin]
    text = case.text(row.messages, False, row.tools)
    start = text.find(ANSWER)
    ids = case.ids(text[:start])
    differs = case.spelt(whole(example)) != text[: len(case.spelt(whole(example)))]
    return pair(example, ids, [*case.ids(ANSWER), *case.end(example)]) if differs else None


def prompt_without_header(case: Case, example: Example) -> Planted:
    n = header_of(case, example)
    return pair(example, example.prompt_tokens[:-n], example.answer_tokens) if n else None


def edges_lost(case: Case, example: Example) -> Planted:
    text = case.spelt(example.answer_tokens)
    assert ANSWER in text
    return pair(example, example.prompt_tokens, case.ids(text.replace(ANSWER, ANSWER[1:-1])))


def half_answer(case: Case, example: Example) -> Planted:
    """Cut to a length, and the end token put back."""
    n = len(example.answer_tokens)
    return pair(example, example.prompt_tokens, [*example.answer_tokens[: n // 2], *case.end(example)])


def previous_answer_missing(case: Case, example: Example) -> Planted:
    text = case.spelt(example.prompt_tokens)
    assert ANSWER in text
    return pair(example, case.ids(text.replace(ANSWER, "")), example.answer_tokens)


def previous_answer_changed(case: Case, example: Example) -> Planted:
    text = case.spelt(example.prompt_tokens)
    return pair(example, case.ids(text.replace(ANSWER, ANSWER[::-1])), example.answer_tokens)


def another_end(case: Case, example: Example) -> Planted:
    """The pad token, which is some other control token, where the terminator belongs."""
    pads = [n for n in case.tokenizer.control_tokens.values() if n != example.answer_tokens[-1]]
    return pair(example, example.prompt_tokens, [*example.answer_tokens[:-1], pads[0]])


def extra_bos(case: Case, example: Example) -> Planted:
    return pair(example, [case.tokenizer.bos_id(), *example.prompt_tokens], example.answer_tokens)


def lost_bos(case: Case, example: Example) -> Planted:
    starts = example.prompt_tokens[0] == case.tokenizer.bos_id()
    return pair(example, example.prompt_tokens[1:], example.answer_tokens) if starts else None


def merged_boundary(case: Case, example: Example) -> Planted:
    """Prompt and answer tokenised jointly and cut after as many tokens as the prompt has by itself."""
    joint = case.ids(case.spelt(whole(example)))
    n = len(example.prompt_tokens)
    return pair(example, joint[:n], joint[n:]) if joint[:n].tolist() != example.prompt_tokens.tolist() else None


def letter_by_letter(case: Case, ids: np.ndarray) -> list[int]:
    control = set(case.tokenizer.control_tokens.values())
    tokens: list[int] = []
    for token in ids.tolist():
        tokens += [token] if token in control else [i for c in case.spelt([token]) for i in case.tokenizer.encode(c)]
    return tokens


def prompt_tokenised_apart(case: Case, example: Example) -> Planted:
    """The right text in other tokens than the server's, as when messages are tokenised one by one."""
    tokens = letter_by_letter(case, example.prompt_tokens)
    same = case.spelt(tokens) == case.spelt(example.prompt_tokens) and tokens != example.prompt_tokens.tolist()
    return pair(example, tokens, example.answer_tokens) if same else None


def answer_tokenised_apart(case: Case, example: Example) -> Planted:
    tokens = letter_by_letter(case, example.answer_tokens)
    same = case.spelt(tokens) == case.spelt(example.answer_tokens) and tokens != example.answer_tokens.tolist()
    return pair(example, example.prompt_tokens, tokens) if same else None


def stale_template(case: Case, example: Example) -> Planted:
    """Made with a template that says one word more in the header of the user."""
    row = case.rows[example.origin]
    source = case.template.source.replace("message.content", "(message.content ~ '!')").replace(
        "m.content", "(m.content ~ '!')"
    )
    if source == case.template.source:
        return None
    try:
        found = make_examples([row], case.tokenizer, template(source)).examples
    except InstilError:
        return None
    other = next((other for other in found if other.turn == example.turn), None)
    return None if other is None or whole(other).tolist() == whole(example).tolist() else other


def history_kept(case: Case, example: Example) -> Planted:
    """The first answer stands in the second prompt as it was learnt, reasoning and all."""
    first = case.right.get(("thought", 0))
    assert first is not None
    begins, answer = case.spelt(first.prompt_tokens), case.spelt(first.answer_tokens)
    prompt = case.spelt(example.prompt_tokens)
    if "Because of that" not in answer or "Because of that" in prompt:
        return None
    rest = prompt[prompt.rfind("So.") + 3 :]
    return pair(example, case.ids(begins + answer.partition("So.")[0] + "So." + rest), example.answer_tokens)


def user_trained(case: Case, example: Example) -> Planted:
    return pair(example, example.prompt_tokens, [*case.ids(USER), *case.end(example)])


def wrong_turn(case: Case, example: Example) -> Planted:
    return pair(example, case.right["two", 0].prompt_tokens, example.answer_tokens)


def swapped_turns(case: Case, example: Example) -> Planted:
    return dataclasses.replace(case.right["two", 0], turn=1)


def other_row(case: Case, example: Example) -> Planted:
    return pair(example, example.prompt_tokens, case.right["one", 0].answer_tokens)


def tool_result_trained(case: Case, example: Example) -> Planted:
    tokens, first = whole(example), case.right["tools", 0]
    start = len(whole(first))
    return pair(example, tokens[:start], tokens[start:]) if tokens[:start].tolist() == whole(first).tolist() else None


def typed_becomes_control(case: Case, example: Example) -> Planted:
    prompt, answer = case.ids(case.spelt(example.prompt_tokens)), case.ids(case.spelt(example.answer_tokens))
    return pair(example, prompt, answer) if answer.tolist() != example.answer_tokens.tolist() else None


def truncated_left(case: Case, example: Example) -> Planted:
    return pair(example, example.prompt_tokens[3:], example.answer_tokens)


def trimmed_too_far(case: Case, example: Example) -> Planted:
    """Old turns left the prompt, and the last question with them."""
    text = case.spelt(example.prompt_tokens)
    first, last = text.find(USER), text.rfind("Again? 👋🏽")
    shorter = text[:first] + text[last + len("Again? 👋🏽") :]
    return dataclasses.replace(pair(example, case.ids(shorter), example.answer_tokens), cut_tokens=20)


def trimmed_unsaid(case: Case, example: Example) -> Planted:
    """Old turns left the prompt and nobody says so."""
    row = case.rows["two"]
    return pair(example, case.ids(case.text([row.messages[0], row.messages[3]])), example.answer_tokens)


BUGS: dict[str, Bug] = {
    "answer begins a token late": each(lambda case, e: pair(e, e.prompt_tokens, e.answer_tokens[1:])),
    "boundary a token late": each(lambda case, e: move(e, 1)),
    "boundary a token early": each(lambda case, e: move(e, -1)),
    "terminator dropped": each(lambda case, e: pair(e, e.prompt_tokens, e.answer_tokens[:-1])),
    "terminator without weight": each(
        lambda case, e: dataclasses.replace(e, weights=np.append(e.weights[:-1], np.float32(0)))
    ),
    "terminator twice": each(lambda case, e: pair(e, e.prompt_tokens, [*e.answer_tokens, *case.end(e)])),
    "line break after the terminator": each(
        lambda case, e: pair(e, e.prompt_tokens, [*e.answer_tokens, *case.ids("\n")])
    ),
    "another end": each(another_end),
    "header trained": each(header_trained),
    "header twice": each(header_twice),
    "stored header twice": each(stored_header_twice),
    "cut from the whole": at("two")(cut_from_the_whole),
    "merged boundary": at("merged")(merged_boundary),
    "prompt without header": each(prompt_without_header),
    "edge characters lost": at("two")(edges_lost),
    "half an answer": each(half_answer),
    "previous answer missing": at("two", 1)(previous_answer_missing),
    "previous answer changed": at("two", 1)(previous_answer_changed),
    "one BOS too many": each(extra_bos),
    "BOS lost": each(lost_bos),
    "prompt tokenised apart": each(prompt_tokenised_apart),
    "answer tokenised apart": each(answer_tokenised_apart),
    "stale template": each(stale_template),
    "history keeps reasoning": at("thought", 1)(history_kept),
    "user text trained": at("two")(user_trained),
    "prompt of another turn": at("two", 1)(wrong_turn),
    "pair of another turn": at("two", 1)(swapped_turns),
    "answer of another row": at("two")(other_row),
    "tool result trained": at("tools", 1)(tool_result_trained),
    "tools left out": at("tools")(lambda case, e: without(case, e, lambda m: True, tools=False)),
    "system prompt left out": at("two")(lambda case, e: without(case, e, lambda m: m.role != "system")),
    "typed control token is a real one": at("typed")(typed_becomes_control),
    "truncated on the left": each(truncated_left),
    "trimmed too far": at("two", 1)(trimmed_too_far),
    "trimmed and not said": at("two", 1)(trimmed_unsaid),
    "no such row": each(lambda case, e: dataclasses.replace(e, origin="none")),
    "no such turn": each(lambda case, e: dataclasses.replace(e, turn=7)),
}
# Where a template has no such thing, or the change would change nothing.
RARE = {
    "BOS lost", "history keeps reasoning", "stale template", "tool result trained", "tools left out", "merged boundary",
    "cut from the whole",
}  # fmt: skip


def planted(bug: Bug, case: Case) -> list[Example]:
    found = bug(case)
    return [one for one in (found if isinstance(found, Iterator) else [found]) if one is not None]


def experiments(case: Case) -> Iterator[tuple[str, list[Example], list[Example]]]:
    """(bug, the wrong examples, all examples shown): in every turn of a row, then in one turn of rows right otherwise."""
    for name, bug in BUGS.items():
        wrong = planted(bug, case)
        yield name, wrong, wrong
        for turn in (0, 1):
            chosen = [one for one in wrong if one.turn == turn and (one.origin, 1) in case.right]
            rows = {one.origin for one in chosen}
            among = {key: right for key, right in case.right.items() if key[0] in rows}
            among.update({(one.origin, one.turn): one for one in chosen})
            yield name, chosen, list(among.values())


def verdicts(cases: list[Case]) -> dict[str, tuple[int, list[str]]]:
    """For each bug how often it could be planted, and where nobody noticed it. Each experiment has rows of its own."""
    found: dict[str, tuple[int, list[str]]] = dict.fromkeys(BUGS, (0, []))
    for case in cases:
        rows: dict[str, Conversation] = {}
        shown: list[Example] = []
        wanted: dict[str, str] = {}
        for number, (name, wrong, examples) in enumerate(experiments(case)):
            for example in examples:
                origin = f"{number}/{example.origin}:1"
                if example.origin in case.rows:
                    rows[origin] = dataclasses.replace(case.rows[example.origin], origin=origin)
                shown.append(dataclasses.replace(example, origin=origin))
            wanted.update({f"{number}/{one.origin}:1: turn {one.turn}": name for one in wrong})
        problems = certify(shown, list(rows.values()), case.tokenizer, case.template, {})[1]
        places = {problem.place for problem in problems}
        for place, name in wanted.items():
            missed = [] if place in places else [f"{case.name}: {place}"]
            found[name] = (found[name][0] + 1, found[name][1] + missed)
        right = {f"{_place(example)}" for example in shown} - wanted.keys()
        assert not right & places, f"{case.name}: right examples are refused: {right & places}"
    return found


def _place(example: Example) -> str:
    return f"{example.origin}: turn {example.turn}"


@pytest.fixture(scope="module", autouse=True)
def _every_example_is_compared_with_the_library() -> Iterator[None]:
    """Not a sample only: here each bug is in a few of many examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "LIBRARY_EVERY", 1)
        yield


@pytest.fixture(scope="module")
def own_verdicts(own: list[Case]) -> dict[str, tuple[int, list[str]]]:
    return verdicts(own)


@pytest.fixture(scope="module")
def real_verdicts(real: list[Case]) -> dict[str, tuple[int, list[str]]]:
    return verdicts(real)


def test_right_examples_have_no_fault(own: list[Case]) -> None:
    """The examples that the bugs are planted into are certified as they are."""
    for case in own:
        right = list(case.right.values())
        counts, problems = certify(right, list(case.rows.values()), case.tokenizer, case.template, {})
        assert problems == [], case.name
        assert counts["by_edit"] + counts["by_rendering"] == len(right) >= 4


def test_right_examples_of_real_templates_have_no_fault(real: list[Case]) -> None:
    """The same with real templates."""
    for case in real:
        right = list(case.right.values())
        assert certify(right, list(case.rows.values()), case.tokenizer, case.template, {})[1] == [], case.name
        assert len(right) >= 4, case.name


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noticed(own_verdicts: dict[str, tuple[int, list[str]]], name: str) -> None:
    """Each known way to teach wrong tokens is noticed with every template it can be planted with."""
    count, unnoticed = own_verdicts[name]
    assert unnoticed == []
    assert count >= (1 if name in RARE else len(OWN) - 1)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noticed_with_real_templates(real_verdicts: dict[str, tuple[int, list[str]]], name: str) -> None:
    """The same with the templates of real models."""
    count, unnoticed = real_verdicts[name]
    assert unnoticed == []
    assert count >= (0 if name == "merged boundary" else 1 if name in RARE else len(REAL) // 2)


WEIGHT_BUGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shifted to the left": lambda weights: np.append(weights[1:], weights[-1]),
    "shifted to the right": lambda weights: np.append(weights[:1], weights[:-1]),
    "rolled": lambda weights: np.roll(weights, 1),
    "all one": np.ones_like,
    "doubled": lambda weights: 2 * weights,
    "first token left out": lambda weights: np.append(np.float32(0), weights[1:]),
    "terminator alone": lambda weights: np.append(0 * weights[:-1], weights[-1:]).astype(np.float32),
    "normalised": lambda weights: weights / weights.sum(),
}


@pytest.mark.parametrize("name", WEIGHT_BUGS)
def test_wrong_weights_are_noticed(own: list[Case], name: str) -> None:
    """A weight that is not that of row, message and kind of token is noticed; the right ones are certified."""
    (case,) = [case for case in own if case.name == "reasons"]
    messages = list(case.rows["thought"].messages)
    messages[3] = dataclasses.replace(messages[3], fields={**messages[3].fields, "weight": 0.5})
    row = dataclasses.replace(case.rows["thought"], messages=tuple(messages), weight=3.0)
    examples = make_examples([row], case.tokenizer, case.template, HALF).examples
    assert [sorted(set(example.weights.tolist())) for example in examples] == [[0.75, 1.5, 3.0], [0.375, 0.75, 1.5]]
    assert certify(examples, [row], case.tokenizer, case.template, {}, HALF)[1] == []
    for example in examples:
        wrong = dataclasses.replace(example, weights=WEIGHT_BUGS[name](example.weights))
        problems = certify([wrong], [row], case.tokenizer, case.template, {}, HALF)[1]
        assert {problem.rule for problem in problems} == {"weights-policy"}
