"""Conversations to examples: the texts of turns become tokens, weighed, counted, and kept within the length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from instil.chat.control import Guarded, guard
from instil.chat.endings import Terminator
from instil.chat.targets import TERMINATOR, kinds_of, weigh
from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import ChatOptions, Turn, TurnMaker, prompt_text
from instil.chat.vetting import time_limit
from instil.errors import Problem, TemplateError
from instil.types import Conversation, Example, Int32, Message

ROWS_AT_ONCE = 512  # rows rendered before their texts are tokenised together,
RENDER_LIMIT_S = 120  # of computing for that many rows; it takes a tenth of a second
TEXT_AT_ONCE = 20_000_000  # and characters of prompts: those of a long conversation's turns add up

# Refusals that say something about the template. Where they hit every row, the template is refused, not the rows.
TEMPLATE_RULES = (
    "rewrites-prompt",
    "content-lost",
    "no-terminator",
    "ambiguous-terminator",
    "double-bos",
    "template-fails",
    "template-raises",
    "system-refused",
    "channel-closed",
)


Rendered = tuple[Guarded, list[Turn], bool]  # a row, its turns as text, and whether it can be used


@dataclass(frozen=True, slots=True)
class Dropped:
    """An example that is too long to be learnt."""

    origin: str
    turn: int
    prompt_tokens: int
    answer_tokens: int
    limit_tokens: int


@dataclass(slots=True)
class Pairs:
    """The examples, the rows that gave none (with the reason), the examples that were too long, and what was noted.

    notes: counts. merged_boundaries: the tokenizer would join the end of the prompt and the start of the answer into
    one token; the server cannot, as it sees the prompt alone: there the answer is tokenised on its own.
    terminators: every way in which the answers end.
    """

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    terminators: tuple[Terminator, ...] = ()

    @property
    def merged_boundaries(self) -> int:
        """How many answers would begin inside a token of the whole text."""
        return self.notes.get("merged_boundaries", 0)


def served_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
    args: Mapping[str, Any] | None = None,
) -> Int32:
    """The tokens that a server puts in front of the model to have it answer `messages`."""
    return _tokens(tokenizer.encode(prompt_text(messages, template, tools, args)))


def make_examples(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template,
    options: ChatOptions | None = None,
) -> Pairs:
    """One example per learnt assistant turn of each conversation, in order.

    A row with a problem gives no example at all. Raises TemplateError where the template is what is wrong: it shows no
    end of a turn, or no row could be used, all for one reason that lies in the template.
    """
    pairs = pairs_of(conversations, tokenizer, template, options)
    refuse_template(pairs, template.place)
    return pairs


def pairs_of(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template,
    options: ChatOptions | None = None,
) -> Pairs:
    """`make_examples` for some rows of many, whose problems say nothing yet about the template."""
    pairs = Pairs()
    if not conversations:
        return pairs
    maker = PairMaker(tokenizer, template, options or ChatOptions(), conversations[0].origin)
    for start in range(0, len(conversations), ROWS_AT_ONCE):
        maker.add(conversations[start : start + ROWS_AT_ONCE], pairs)
    pairs.terminators = maker.turns.endings.found
    for what, count in maker.turns.notes.items():
        pairs.notes[what] = pairs.notes.get(what, 0) + count
    return pairs


def refuse_template(pairs: Pairs, place: str) -> None:
    """Raise one TemplateError where no row got through the template, all for one reason that lies in it."""
    rules = {problem.rule for problem in pairs.problems}
    if pairs.examples or len(rules) != 1 or not rules.issubset(TEMPLATE_RULES):
        return
    first = pairs.problems[0]
    if len(pairs.problems) == 1:
        raise TemplateError(first)
    what = f"{first.what.removesuffix(f' ({place})')} (in every row, {first.place} being the first)"
    raise TemplateError(Problem(place, what, first.remedy, first.rule))


class PairMaker:
    """Makes examples of rows. first: the origin of the first row, for an error that hits them all."""

    def __init__(self, tokenizer: Tokenizer, template: Template, options: ChatOptions, first: str = ""):
        self.tokenizer, self.options = tokenizer, options
        try:
            self.turns = TurnMaker(tokenizer, template, options)
        except TemplateError as error:
            problem = error.problems[0]
            what = f"{problem.what} (in every row, {first} being the first)" if first else problem.what
            raise TemplateError.at(problem.place, what, problem.remedy, problem.rule) from error

    def add(self, rows: Sequence[Conversation], pairs: Pairs) -> None:
        """The examples of these rows, added to `pairs`. Raises TemplateError naming the row in which the template hangs."""
        place, row = self.turns.template.place, rows[0]
        texts: list[Rendered] = []
        begun = size = 0
        try:
            with time_limit(RENDER_LIMIT_S, place):
                for at, row in enumerate(rows):
                    size = self._add(row, texts, size, pairs)
                    if size > TEXT_AT_ONCE or at + 1 == len(rows):
                        self._finish(rows[begun : at + 1], texts, pairs)
                        texts, begun, size = [], at + 1, 0
        except TemplateError as error:
            problem = error.problems[0]
            raise TemplateError.at(
                problem.place, f"{problem.what} at {row.origin}", problem.remedy, problem.rule
            ) from error

    def _add(self, row: Conversation, texts: list[Rendered], size: int, pairs: Pairs) -> int:
        """Render one row; returns the characters of prompts rendered so far."""
        guarded, turns, problems = self._texts(row)
        pairs.problems += problems
        texts.append((guarded, [] if problems else turns, not problems))
        if guarded.typed:
            _count(pairs.notes, "typed_control_tokens", len(guarded.typed))
        return size + sum(len(turn.prompt) for turn in turns)

    def _finish(self, rows: Sequence[Conversation], texts: Sequence[Rendered], pairs: Pairs) -> None:
        """Tokenise what was rendered."""
        encoded = self._encode(texts)
        for row, (guarded, turns, usable) in zip(rows, texts, strict=True):
            if row.pair is not None:
                if usable:
                    self._keep(row, guarded, [], [_given(row)], pairs)
                continue
            examples, problems = [], []
            for turn in turns:
                made = self._example(guarded, turn, encoded, pairs.notes)
                if isinstance(made, Problem):
                    problems.append(made)
                else:
                    examples.append(made)
            if problems:
                pairs.problems += problems
            elif examples:
                self._keep(row, guarded, turns, examples, pairs)

    def _texts(self, row: Conversation) -> tuple[Guarded, list[Turn], list[Problem]]:
        if row.pair is not None:
            return Guarded(row), [], list(_pair_problems(row, self.tokenizer))
        guarded, problems = guard(row, self.tokenizer, self.options.control_text)
        if problems:
            return guarded, [], problems
        turns, problems = self.turns.turns(guarded.row)
        if guarded.typed and turns and not problems:
            problems = self._changed(row, guarded, turns)
        return guarded, turns, problems

    def _changed(self, row: Conversation, guarded: Guarded, turns: Sequence[Turn]) -> list[Problem]:
        """What is wrong where the template treats a typed control token otherwise than the digits that stand for it."""
        own, template = self.turns.numbered(row), self.turns.template
        held = self.turns.numbered(guarded.row)
        for turn in turns:
            for end, ask in ((turn.index, True), (turn.index + 1, False)):
                texts = [
                    template.render(
                        each.messages[:end], tools=each.tools, args=each.template_args, generation_prompt=ask
                    )
                    for each in (own, held)
                ]
                if texts[0] != guarded.restore(texts[1]):
                    what = "the template changes the control tokens that this turn, or one before it, types"
                    place = f"{row.origin}: messages[{turn.index}]"
                    return [Problem(place, what, "remove them from the row", "control-token")]
        return []

    def _encode(self, texts: Sequence[Rendered]) -> dict[str, Int32]:
        """The ids of every prompt and of every prompt with its answer, by text."""
        wanted: dict[str, None] = {}
        found: dict[str, Int32] = {}
        for guarded, turns, _ in texts:
            if guarded.typed:
                continue
            if len(turns) > 1 and all(turn.rendered for turn in turns):
                ends = [end for turn in turns for end in (len(turn.prompt), len(turn.prompt) + len(turn.answer))]
                whole = turns[-1].rendered
                ids = self.tokenizer.encode_prefixes(whole, ends)
                found.update(zip((whole[:end] for end in ends), ids, strict=True))
                continue
            for turn in turns:
                wanted[turn.prompt] = None
                wanted[turn.prompt + turn.answer] = None
        found.update(zip(wanted, self.tokenizer.encode_arrays(list(wanted)), strict=True))
        return found

    def _ids(self, guarded: Guarded, text: str, encoded: Mapping[str, Int32]) -> Int32:
        """The ids of a rendered text, in which typed control tokens stay text."""
        found = encoded.get(text)
        if found is not None:
            return found
        return _tokens(
            self.tokenizer.encode_marked(guarded.pieces(text)) if guarded.typed else self.tokenizer.encode(text)
        )

    def _example(
        self, guarded: Guarded, turn: Turn, encoded: Mapping[str, Int32], notes: dict[str, int]
    ) -> Example | Problem:
        """The example of a turn: prompt as served; answer as it follows in the whole text, or apart where they merge."""
        row, tokenizer = guarded.row, self.tokenizer
        place = f"{row.origin}: messages[{turn.index}]"
        try:
            prompt = self._ids(guarded, turn.prompt, encoded)
            joint = self._ids(guarded, turn.prompt + turn.answer, encoded)
            merged = len(joint) < len(prompt) or not np.array_equal(joint[: len(prompt)], prompt)
            answer = self._ids(guarded, turn.answer, encoded) if merged else joint[len(prompt) :]
        except ValueError as error:
            return Problem(place, str(error), "remove the control token from the row", "control-token")
        ending = len(turn.terminator.token_ids)
        if merged:
            spelt = guarded.restore(turn.prompt + turn.answer)
            if tokenizer.decode([*prompt.tolist(), *answer.tolist()]) != spelt:
                what = "the tokenizer joins prompt and answer, and apart their tokens spell another text"
                return Problem(place, what, "remove the row, or use --template FILE", "torn-boundary")
        problem = self._fault(turn, prompt, answer, place)
        if problem is not None:
            return problem
        if merged:
            _count(notes, "merged_boundaries")
        if turn.terminator.token_id is None:
            ending = _ending_tokens(answer, turn.terminator, tokenizer)
        if turn.spans:
            restored = turn.spans if not guarded.typed else _restored(guarded, turn)
            kinds = kinds_of(answer.tolist(), ending, list(restored), tokenizer)
        else:
            kinds = np.zeros(len(answer), np.int8)
            kinds[len(answer) - ending :] = TERMINATOR
        weights = np.full(len(answer), turn.weight, np.float32)
        return Example(prompt, answer, weights, row.origin, turn.turn, row.task, kinds, source=row.source)

    def _fault(self, turn: Turn, prompt: Int32, answer: Int32, place: str) -> Problem | None:
        """What forbids training on these tokens, if anything does."""
        terminator, tokenizer = turn.terminator, self.tokenizer
        if not len(prompt):
            what = "the template makes no prompt of the messages before it"
            return Problem(place, what, "use --template FILE with one that does", "no-prompt")
        if len(prompt) > 1 and prompt[0] == prompt[1] == tokenizer.bos_id():
            what = f"the prompt begins with {tokenizer.special['bos_token']!r} twice"
            return Problem(place, what, "use --template FILE with one that writes it once", "double-bos")
        if terminator.token_id is None:
            ended = len(answer) > 0 and tokenizer.decode(answer.tolist()).endswith(terminator.text)
        else:
            ended = len(answer) > 0 and int(answer[-1]) == terminator.token_id
        if not ended:
            what = f"the tokens of the answer do not end with {terminator.text!r}"
            return Problem(place, what, "remove the row, or use --template FILE", "no-terminator")
        if terminator.token_id is not None and terminator.token_id in answer[:-1]:
            what = f"the content becomes the control token {terminator.text!r} when tokenised"
            return Problem(place, what, "remove it, or set chat.control_text=plain", "control-token")
        return None

    def _keep(
        self, row: Conversation, guarded: Guarded, turns: Sequence[Turn], examples: list[Example], pairs: Pairs
    ) -> None:
        """Those of a row's examples that are short enough, after trimming where that is asked for."""
        limit = self.options.limit_tokens
        if limit is not None and any(example.length_tokens > limit for example in examples):
            fitting = []
            for at, example in enumerate(examples):
                if example.length_tokens > limit and self.options.too_long == "trim-context" and turns:
                    example = self._trimmed(guarded, turns[at], example, limit)
                if example.length_tokens <= limit:
                    fitting.append(example)
                    continue
                sizes = len(example.prompt_tokens), len(example.answer_tokens)
                pairs.dropped.append(Dropped(row.origin, example.turn, *sizes, limit))
                if self.options.too_long == "error":
                    what = f"answer {example.turn} needs {example.length_tokens:,} tokens, more than {limit:,}"
                    remedy = "raise pack.tokens, or set data.too_long to drop or trim-context"
                    pairs.problems.append(Problem(row.origin, what, remedy, "too_long"))
            examples = fitting
        pairs.examples += weigh(examples, self.options.targets)

    def _trimmed(self, guarded: Guarded, turn: Turn, example: Example, limit: int) -> Example:
        """The example with as few whole old turns removed from its prompt as make it fit; itself where none do."""
        row = guarded.row
        before = row.messages[: turn.index]
        head = next((i for i, message in enumerate(before) if message.role not in ("system", "developer")), 0)
        starts = [i for i, message in enumerate(before) if i >= head and message.role == "user"]
        for start in starts[1:]:
            try:
                shorter = self.turns.slow(row, turn.index, [*before[:head], *before[start:]])
            except TemplateError:  # a template may refuse what is left, as when it begins with a tool result
                continue
            made = self._example(guarded, replace(shorter, turn=turn.turn, weight=turn.weight), {}, {})
            if isinstance(made, Example) and made.length_tokens <= limit:
                cut = len(example.prompt_tokens) - len(made.prompt_tokens)
                return replace(made, cut_tokens=max(0, cut))
        return example


def _restored(guarded: Guarded, turn: Turn) -> list[tuple[int, int, int]]:
    """Spans of a text with placeholders as spans of the text with the typed tokens."""

    def moved(character: int) -> int:
        return len(guarded.restore(turn.body[:character]))

    return [(kind, moved(first), moved(last)) for kind, first, last in turn.spans]


def _ending_tokens(answer: Int32, terminator: Terminator, tokenizer: Tokenizer) -> int:
    """How many tokens at the end of an answer spell a terminator that is not one token."""
    ids = answer.tolist()
    count = next((n for n in range(1, len(ids) + 1) if terminator.text in tokenizer.decode(ids[-n:])), len(ids))
    return count


def _given(row: Conversation) -> Example:
    """The pair that the user tokenised."""
    assert row.pair is not None
    answer = _tokens(row.pair.answer_tokens)
    kinds = np.zeros(len(answer), np.int8)
    kinds[-1:] = TERMINATOR
    weights = np.asarray(row.pair.weights, np.float32) * np.float32(row.weight)
    return Example(_tokens(row.pair.prompt_tokens), answer, weights, row.origin, row.first_turn, row.task, kinds,
                   source=row.source)  # fmt: skip


def _pair_problems(row: Conversation, tokenizer: Tokenizer) -> list[Problem]:
    """What is wrong with a pair that the user tokenised."""
    assert row.pair is not None
    problems = []
    for name, ids in (("prompt_tokens", row.pair.prompt_tokens), ("answer_tokens", row.pair.answer_tokens)):
        if not ids:
            problems.append(Problem(f"{row.origin}: {name}", "is empty", "give at least one token", "no-answer"))
        elif max(ids) >= tokenizer.vocab_size or min(ids) < 0:
            what = f"holds the id {max(ids) if max(ids) >= tokenizer.vocab_size else min(ids)}"
            remedy = f"ids of this tokenizer run from 0 to {tokenizer.vocab_size - 1:,}; tokenise with it"
            problems.append(Problem(f"{row.origin}: {name}", what, remedy, "token-id"))
    if not problems and not row.pair.weights[-1] > 0:
        what = "the last token has no weight, so the model would not learn to stop"
        problems.append(Problem(f"{row.origin}: weights", what, "give it one", "weights-terminator"))
    return problems


def _count(notes: dict[str, int], what: str, by: int = 1) -> None:
    notes[what] = notes.get(what, 0) + by


def _tokens(ids: Sequence[int]) -> Int32:
    return np.asarray(ids, dtype=np.int32)
