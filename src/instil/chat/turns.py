"""Conversations to examples: per assistant turn, what the server sends and what the model must then emit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.errors import InstilError, Problem, TemplateError
from instil.types import Conversation, Example, Int32, Message

ROWS_AT_ONCE = 512  # rows rendered before their texts are tokenised together: a few MB of text
PROBE_QUESTION = "instil asks what comes next"
PROBE_ANSWER = "instil looks for this answer"
OTHER_TEMPLATE = (
    "use --template FILE with one that appends each answer to the prompt and closes it with a control token"
)

# Refusals that say something about the template. Where they hit every row, the template is refused, not the rows.
TEMPLATE_RULES = (
    "rewrites-prompt",
    "content-lost",
    "no-terminator",
    "ambiguous-terminator",
    "double-bos",
    "template-fails",
)


@dataclass(frozen=True, slots=True)
class Terminator:
    """The control token that ends an answer; lead = what the template itself writes between the content and it."""

    text: str
    token_id: int
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The examples, the rows that gave none (with the reason), and how many answers begin inside a token of the text.

    merged_boundaries: the tokenizer would join the end of the prompt and the start of the answer into one token.
    The server cannot, as it sees the prompt alone: there the answer is tokenised on its own.
    """

    examples: list[Example]
    problems: list[Problem]
    merged_boundaries: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """One assistant turn as text."""

    prompt_text: str
    answer_text: str
    place: str  # origin and message
    turn: int
    weight: float  # of every token of the answer


def served_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, tools: Sequence[Mapping[str, Any]] = ()
) -> Int32:
    """The tokens that a server puts in front of the model to have it answer `messages`."""
    return _tokens(tokenizer.encode(prompt_text(messages, template, tools)))


def prompt_text(messages: Sequence[Message], template: Template, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text behind `served_prompt`, the only place where the text of a prompt is made."""
    return template.render(messages, tools=tools, generation_prompt=True)


def make_examples(conversations: Sequence[Conversation], tokenizer: Tokenizer, template: Template) -> Pairs:
    """One example per assistant turn of each conversation, in order; every token has the weight of its message.

    A row with a problem gives no example at all. Raises TemplateError as soon as the template is what is wrong:
    it is refused on a fixed conversation, or no row so far could be used, all for one reason that lies in the template.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    merged_boundaries = 0
    if not conversations:
        return Pairs(examples, problems, merged_boundaries)
    terminator = _terminator_for(conversations[0].origin, template, tokenizer)
    for start in range(0, len(conversations), ROWS_AT_ONCE):
        rows = conversations[start : start + ROWS_AT_ONCE]
        texts = [_row_texts(row, tokenizer, template, terminator) for row in rows]
        pieces = _encode_turns([turn for turns, _ in texts for turn in turns], tokenizer)
        for row, (turns, wrong) in zip(rows, texts, strict=True):
            made, merged, unfit = _row_examples(row, turns, pieces, tokenizer, terminator)
            problems += wrong + unfit
            if not wrong and not unfit:
                examples += made
                merged_boundaries += merged
        rules = {problem.rule for problem in problems}
        if not examples and len(rules) == 1 and rules.issubset(TEMPLATE_RULES):
            raise TemplateError(*problems)
    return Pairs(examples, problems, merged_boundaries)


def find_terminator(template: Template, tokenizer: Tokenizer) -> Terminator:
    """The control token with which the template ends an answer, found on a fixed conversation.

    Raises TemplateError when the template does not append the answer, leaves it out, or ends it without control token.
    """
    question, answer = Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER)
    opening = [question]
    try:
        prompt = prompt_text(opening, template)
    except TemplateError:  # some templates want a system message first
        opening = [Message("system", PROBE_QUESTION), question]
        prompt = prompt_text(opening, template)
    rest = _appended(prompt, template.render([*opening, answer], generation_prompt=False), template.place)
    head, found, tail = rest.partition(PROBE_ANSWER)
    if not found or PROBE_ANSWER in tail:
        what = f"the template writes the assistant's content {rest.count(PROBE_ANSWER)} times into its turn, not once"
        raise TemplateError.at(template.place, what, OTHER_TEMPLATE, "content-lost")
    match = tokenizer.control_pattern.search(tail)
    if match is None:
        what = f"no control token of the tokenizer ends the assistant's turn: {tail[:40]!r} follows its content"
        raise TemplateError.at(template.place, what, OTHER_TEMPLATE, "no-terminator")
    terminator = Terminator(match.group(), tokenizer.control_tokens[match.group()], tail[: match.start()])
    _check_single_end(head, tail[match.end() :], terminator, template.place)
    return terminator


def _terminator_for(origin: str, template: Template, tokenizer: Tokenizer) -> Terminator:
    """`find_terminator`, its refusal naming the first row that it hits."""
    try:
        return find_terminator(template, tokenizer)
    except TemplateError as error:
        problem = error.problems[0]
        what = f"{problem.what} (in every row, {origin} being the first)"
        raise TemplateError.at(problem.place, what, problem.remedy, problem.rule) from error


def _row_texts(
    row: Conversation, tokenizer: Tokenizer, template: Template, terminator: Terminator
) -> tuple[list[_Turn], list[Problem]]:
    """The assistant turns of a row as text, and what is wrong with the row."""
    problems = list(_typed_control_tokens(row, tokenizer))
    turns: list[_Turn] = []
    answered = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    if not answered:
        problems.append(Problem(row.origin, "no assistant turn", "add one, or remove the row", "no-answer"))
    if problems:
        return [], problems
    for turn, index in enumerate(answered):
        if row.messages[index].weight == 0:  # context that the row does not want learnt
            continue
        place = f"{row.origin}: messages[{index}]"
        try:
            if index == 0:
                remedy = "put a system or user message before it"
                raise TemplateError.at(place, "an answer to nothing: no message comes before it", remedy, "no-prompt")
            prompt = prompt_text(row.messages[:index], template, row.tools)
            whole = template.render(row.messages[: index + 1], tools=row.tools, generation_prompt=False)
            answer = _answer_text(_appended(prompt, whole, place), row.messages[index], terminator, place)
            turns.append(_Turn(prompt, answer, place, turn, row.messages[index].weight))
        except InstilError as error:
            problems += [_placed(problem, place) for problem in error.problems]
    return turns, problems


def _placed(problem: Problem, place: str) -> Problem:
    """The problem with the row's place in front, where it only names the template."""
    if problem.place.startswith(place):
        return problem
    return Problem(place, f"{problem.what} ({problem.place})", problem.remedy, problem.rule)


def _typed_control_tokens(row: Conversation, tokenizer: Tokenizer) -> Iterator[Problem]:
    """Control tokens spelt out in the row's own text, which would become real ones."""
    texts = [(f"messages[{index}].content", message.content) for index, message in enumerate(row.messages)]
    for index, message in enumerate(row.messages):
        texts += [
            (f"messages[{index}].{key}", text) for key, value in message.fields.items() for text in _strings(value)
        ]
    texts += [("tools", text) for tool in row.tools for text in _strings(tool)]
    for where, text in texts:
        match = tokenizer.control_pattern.search(text)
        if match is not None:
            what = f"contains the control token '{match.group()}' as text"
            yield Problem(f"{row.origin}: {where}", what, "remove it", "control-token")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _appended(prompt: str, whole: str, place: str) -> str:
    """What `whole` adds to `prompt`. Raises TemplateError when it does not begin with it."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    pairs = enumerate(zip(prompt, whole, strict=False))
    same = next((i for i, (left, right) in pairs if left != right), min(len(prompt), len(whole)))
    what = (
        "the template rewrites the prompt once the answer is there: "
        f"character {same} on, {prompt[same : same + 24]!r} becomes {whole[same : same + 24]!r}"
    )
    raise TemplateError.at(place, what, OTHER_TEMPLATE, "rewrites-prompt")


def _answer_text(rest: str, message: Message, terminator: Terminator, place: str) -> str:
    """The part of an assistant turn that the model must emit: from its start through the terminator."""
    body, found, after = rest.partition(terminator.text)
    if not found:
        what = f"the turn does not end with {terminator.text!r} as plain answers do, but with {rest[-24:]!r}"
        raise TemplateError.at(place, what, OTHER_TEMPLATE, "no-terminator")
    _check_single_end("", after, terminator, place)
    calls = message.fields.get("tool_calls")
    if calls:
        lost = next((name for name in _called(calls) if name not in body), None)
        if lost is not None:
            what = f"the template leaves out the call of {lost!r}"
            raise TemplateError.at(place, what, "use --template FILE with one that writes tool calls", "content-lost")
    if not (message.content.strip() in body if calls else _ends_with(body, message.content, terminator.lead)):
        what = f"the content cannot be found, whole and last, in what the template makes of it: {body[:40]!r}"
        raise TemplateError.at(place, what, "change the content, or use --template FILE", "content-lost")
    return body + terminator.text


def _ends_with(body: str, content: str, lead: str) -> bool:
    """Whether `body` ends with `content` and the template's own `lead`; the content may have been trimmed."""
    if not body.endswith(lead):
        return False
    body = body[: len(body) - len(lead)]
    core, bare = content.strip(), body.rstrip()
    kept, full = body[len(bare) :], content[len(content.rstrip()) :]
    return bare.endswith(core) and (full.startswith(kept) or not core)


def _called(calls: Any) -> Iterator[str]:
    """The names of the functions that `tool_calls` calls."""
    for call in calls if isinstance(calls, (list, tuple)) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            yield name


def _check_single_end(before: str, after: str, terminator: Terminator, place: str) -> None:
    """Refuse a turn with a second terminator: before the content the server would stop at it, after it is ambiguous."""
    between, again, _ = after.partition(terminator.text)
    if terminator.text in before or (again and between.strip()):
        what = f"the template writes {terminator.text!r} more than once into one answer"
        raise TemplateError.at(place, what, OTHER_TEMPLATE, "ambiguous-terminator")


def _encode_turns(turns: Sequence[_Turn], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The ids of every prompt and of every prompt with its answer, by text."""
    texts = {text: None for turn in turns for text in (turn.prompt_text, turn.prompt_text + turn.answer_text)}
    return dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))


def _row_examples(
    row: Conversation,
    turns: Sequence[_Turn],
    pieces: Mapping[str, list[int]],
    tokenizer: Tokenizer,
    terminator: Terminator,
) -> tuple[list[Example], int, list[Problem]]:
    """The examples of a row, how many of them have a merged boundary, and what is wrong with their tokens."""
    examples, merged_boundaries, problems = [], 0, []
    for turn in turns:
        prompt = pieces[turn.prompt_text]
        joint = pieces[turn.prompt_text + turn.answer_text]
        merged = joint[: len(prompt)] != prompt
        answer = tokenizer.encode(turn.answer_text) if merged else joint[len(prompt) :]
        problem = _token_problem(turn, prompt, answer, tokenizer, terminator)
        if problem is None and merged and tokenizer.decode(prompt + answer) != turn.prompt_text + turn.answer_text:
            what = "the tokenizer joins prompt and answer, and apart their tokens spell another text"
            problem = Problem(turn.place, what, "remove the row, or use --template FILE", "torn-boundary")
        if problem is not None:
            problems.append(problem)
            continue
        merged_boundaries += merged
        weights = np.full(len(answer), turn.weight, dtype=np.float32)
        examples.append(Example(_tokens(prompt), _tokens(answer), weights, row.origin, turn.turn, row.task))
    return examples, merged_boundaries, problems


def _token_problem(
    turn: _Turn, prompt: list[int], answer: list[int], tokenizer: Tokenizer, terminator: Terminator
) -> Problem | None:
    """What forbids training on these tokens, if anything does."""
    if not prompt:
        what = "the template makes no prompt of the messages before it"
        return Problem(turn.place, what, "use --template FILE with one that does", "no-prompt")
    if len(prompt) > 1 and prompt[0] == prompt[1] == tokenizer.bos_id():
        what = f"the prompt begins with {tokenizer.special['bos_token']!r} twice"
        return Problem(turn.place, what, "use --template FILE with one that writes it once", "double-bos")
    if not answer or answer[-1] != terminator.token_id:
        what = f"the tokens of the answer do not end with {terminator.text!r}"
        return Problem(turn.place, what, "remove the row, or use --template FILE", "no-terminator")
    if terminator.token_id in answer[:-1]:
        what = f"the content becomes the control token {terminator.text!r} when tokenised"
        return Problem(turn.place, what, "remove it", "control-token")
    return None


def _tokens(ids: Sequence[int]) -> Int32:
    return np.asarray(ids, dtype=np.int32)
