"""A conversation to the texts of its turns: what the server sends, and what the model must then emit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from instil.chat.channel import find_channel
from instil.chat.control import ControlText
from instil.chat.endings import Endings, Terminator, call_id
from instil.chat.targets import THINK, THOUGHT, THOUGHT_BEGINS, Span, Targets, spans
from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.tracking import Appended, tracked
from instil.errors import InstilError, Problem, TemplateError
from instil.types import Conversation, Message

OTHER_TEMPLATE = "use --template FILE with one that writes it, or remove the row"
SYSTEM_REFUSED = "system-refused"
MARKUP = re.compile(r"<[^<>]*>|\[/?THINK\]")
OPENED = re.compile(r"(<[^<>/|]+>)\s*$")
READS_ID = re.compile(r"\bid\b|tool_call_id")


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How pairs are made. terminator: what the user says the server stops at; stops: generation_config's eos texts.

    limit_tokens: the longest example, None = any; too_long: what happens to a longer one.
    """

    control_text: ControlText = "plain"
    terminator: str | None = None
    stops: tuple[str, ...] = ()
    targets: Targets = field(default_factory=Targets)
    limit_tokens: int | None = None
    too_long: Literal["drop", "error", "trim-context"] = "drop"


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn as text. index: of its message; turn: its number among the answers of the row.

    answer = body + terminator.text. spans: what of the body is not plain answer. rendered: the text of the whole row where
    prompt and answer are its beginning, "" where they were rendered by themselves.
    """

    prompt: str
    body: str
    terminator: Terminator
    index: int
    turn: int
    weight: float
    spans: tuple[Span, ...] = ()
    rendered: str = ""

    @property
    def answer(self) -> str:
        """What the model must emit."""
        return self.body + self.terminator.text


def prompt_text(
    messages: Sequence[Message],
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
    args: Mapping[str, Any] | None = None,
) -> str:
    """What a server makes of `messages` to have them answered; the only place where the text of a prompt is made."""
    return template.render(messages, tools=tools, args=args, generation_prompt=True)


class TurnMaker:
    """Texts of turns for one template and tokenizer. notes: how often something was done that a user should know.

    Raises TemplateError when the template itself cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, options: ChatOptions):
        self.template = template
        self.options = options
        self.endings = Endings(template, tokenizer, options.terminator, options.stops)
        self.notes: dict[str, int] = {}
        self._tracked = tracked(template)
        self._channels: dict[tuple[str, str], str | None] = {}
        self._reads_id = bool(READS_ID.search(template.source))

    def turns(self, row: Conversation) -> tuple[list[Turn], list[Problem]]:
        """The learnt turns of a row, and what is wrong with it; a row with a problem is not used at all."""
        answered = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
        if not answered:
            return [], [Problem(row.origin, "no assistant turn", "add one, or remove the row", "no-answer")]
        learnt = [(turn, index) for turn, index in enumerate(answered) if row.messages[index].weight > 0]
        if self.options.targets.turns == "last":
            learnt = learnt[-1:]
        if not learnt or row.weight == 0:
            return [], []
        if any(message.fields.get("tool_calls") for message in row.messages):
            self.endings.look_at_calls()
        if self.template.null_content and any(m.fields.get("tool_calls") and not m.content for m in row.messages):
            self._note("rows_with_null_content")
        unnumbered, row = row, self.numbered(row)
        if row is not unnumbered:
            self._note("rows_with_numbered_calls")
        whole = self._tracked.render(row.messages[: learnt[-1][1] + 1], row.tools, row.template_args)
        made: list[Turn] = []
        problems: list[Problem] = []
        for turn, index in learnt:
            place = f"{row.origin}: messages[{index}]"
            try:
                if index == 0:
                    remedy = "put a system or user message before it, or give it weight 0"
                    raise TemplateError.at(
                        place, "an answer to nothing: no message comes before it", remedy, "no-prompt"
                    )
                found = None if whole is None else self._from_whole(row, index, whole)
                made.append(replace(found or self.slow(row, index), turn=turn + row.first_turn))
            except InstilError as error:
                problems += [_placed(self._explained(problem, row, index), place) for problem in error.problems]
        return made, problems

    def _from_whole(self, row: Conversation, index: int, whole: Appended) -> Turn | None:
        """The turn as a part of the row's one rendering; None where something is wrong, so that `slow` says what."""
        start = whole.ends[index - 1]
        if not whole.text.startswith(whole.header, start):
            return None
        start += len(whole.header)
        rest = whole.text[start : whole.ends[index]]
        found = self._cut(row, index, whole.text[:start], rest)
        if isinstance(found, Problem):
            return None
        return replace(found, rendered=whole.text) if rest.startswith(found.answer) else found

    def _explained(self, problem: Problem, row: Conversation, index: int) -> Problem:
        """A refusal by the template, told apart: is it the system message that it does not take?"""
        if problem.rule != "template-raises" or row.messages[0].role not in ("system", "developer"):
            return problem
        try:
            prompt_text(row.messages[1:index], self.template, row.tools, row.template_args)
        except InstilError:
            return problem
        remedy = "move its text into the first user message, or use --template FILE"
        return Problem(
            problem.place, f"{problem.what} (without the system message it would not)", remedy, SYSTEM_REFUSED
        )

    def appends(self, row: Conversation) -> bool:
        """Whether the template provably writes each message of this row after those before it, and changes none."""
        return self._tracked.render(row.messages, row.tools, row.template_args) is not None

    def slow(self, row: Conversation, index: int, before: Sequence[Message] | None = None) -> Turn:
        """One turn by the definition: the prompt and the conversation through the turn, each rendered by itself.

        before: messages in place of those before the turn.
        """
        before = row.messages[:index] if before is None else before
        message, tools, args = row.messages[index], row.tools, row.template_args
        place = f"{row.origin}: messages[{index}]"
        prompt = prompt_text(before, self.template, tools, args)
        whole = self.template.render([*before, message], tools=tools, args=args, generation_prompt=False)
        if whole.startswith(prompt):
            return _good(self._cut(row, index, prompt, whole[len(prompt) :]))
        return self._through_channel(row, index, before, prompt, whole, place)

    def _through_channel(
        self, row: Conversation, index: int, before: Sequence[Message], prompt: str, whole: str, place: str
    ) -> Turn:
        """The turn where the prompt opens a channel that the finished turn lacks (see channel.py)."""
        message = row.messages[index]
        channel = find_channel(self.template, before, row.tools, row.template_args, prompt, self._channels)
        if channel is None or whole[: channel.shared] != prompt[: channel.shared]:
            rest = _after_same_message(before[-1], prompt, whole)
            found = None if rest is None else self._cut(row, index, prompt, rest)
            if isinstance(found, Problem) and found.rule == "ambiguous-terminator":
                raise TemplateError(found)
            if found is None or isinstance(found, Problem):
                closed = THOUGHT.search(prompt[-60:])
                if closed is not None and (message.reasoning or THINK.match(message.content)):
                    raise _channel_closed(place, closed.group().strip())
                raise TemplateError.at(place, *_rewritten(prompt, whole), "rewrites-prompt")
            self._note("history_rewritten")
            return found
        rest = whole[channel.shared :]
        opener = channel.opening.strip()
        if channel.is_open and message.content.lstrip().startswith(opener):
            inline = message.content.lstrip()[len(opener) :].removeprefix(channel.opening[len(opener.rstrip()) :])
            rest = inline + self.endings.of(message).lead + self._tail(rest, message)
        elif rest.startswith(channel.lead):
            rest = channel.closing + rest[len(channel.lead) :]
            if not channel.is_open and _opens(rest, channel.opening):
                raise _channel_closed(place, channel.opening)
        else:
            raise TemplateError.at(place, *_rewritten(prompt, whole), "rewrites-prompt")
        found = _good(self._cut(row, index, prompt, rest))
        self._note("channels_closed" if channel.is_open else "channels_closed_by_prompt")
        return found

    def _tail(self, rest: str, message: Message) -> str:
        """What the rendering holds from the terminator on."""
        ending = self.endings.of(message)
        at = rest.rfind(ending.text)
        return rest[at:] if at >= 0 else ""

    def _cut(self, row: Conversation, index: int, prompt: str, rest: str) -> Turn | Problem:
        """The turn whose rendering after the prompt is `rest`: its answer ends with the terminator, its content is in it."""
        place = f"{row.origin}: messages[{index}]"
        message = row.messages[index]
        ending = self.endings.of(message)
        body, found, after = rest.partition(ending.text)
        if not found and not ending.appended:
            what = f"the turn does not end with {ending.text!r} as other answers do, but with {rest[-24:]!r}"
            return Problem(place, what, OTHER_TEMPLATE, "no-terminator")
        between, again, _ = after.partition(ending.text)
        if (again and between.strip()) or (found and not again and ending.token_id is None and after.strip()):
            what = f"the answer holds {ending.text!r}, which ends it, more than once: the server would stop too early"
            return Problem(place, what, "remove it from the content", "ambiguous-terminator")
        for problem in self._content_faults(message, prompt, body, place):
            return problem
        simple = not message.fields and not any(tag in body for tag in THOUGHT_BEGINS)
        of_body = () if simple else tuple(spans(message, prompt, body))
        return Turn(prompt, body, ending, index, 0, message.weight * row.weight, of_body)

    def _content_faults(self, message: Message, prompt: str, body: str, place: str) -> Iterator[Problem]:
        """What of the message the template left out of the answer, or wrote into a channel that the prompt opened."""
        content = message.content.strip()
        opened = OPENED.search(prompt[-40:]) if content.startswith("<") else None
        if opened is not None and content.startswith(opened.group(1)) and opened.group(1) in body:
            what = f"the prompt opens the channel {opened.group(1)!r}, and the content opens it once more"
            yield Problem(place, what, "put the reasoning into the field reasoning_content", "channel-closed")
        if content not in body:
            kept = re.split(r"</think>|\[/THINK\]|<channel\|>", content)[-1].strip()
            if kept == content or kept not in body:
                what = f"the content cannot be found, whole, in what the template makes of it: {body[:40]!r}"
                yield Problem(place, what, "change the content, or use --template FILE", "content-lost")
            elif not all(part.strip() in body for part in MARKUP.split(content.removesuffix(kept))):
                self._note("reasoning_left_out")
        if message.reasoning and message.reasoning.strip() not in body:
            self._note("reasoning_left_out")
        calls = message.fields.get("tool_calls")
        if calls:
            lost = next((text for text in _called(calls) if not _written(text, body)), None)
            if lost is not None:
                what = f"the template leaves out {lost[:40]!r} of the tool calls"
                yield Problem(place, what, "use --template FILE with one that writes tool calls", "content-lost")

    def numbered(self, row: Conversation) -> Conversation:
        """Calls without an id get one where the template reads ids, as servers number them; results follow in order."""
        if not self._reads_id or not any(m.fields.get("tool_calls") or m.role == "tool" for m in row.messages):
            return row
        messages: list[Message] = []
        waiting: list[str] = []
        number, changed = 0, False
        for message in row.messages:
            fields = dict(message.fields)
            calls = fields.get("tool_calls")
            if message.role == "assistant" and isinstance(calls, (list, tuple)):
                waiting = []
                for call in calls:
                    given = isinstance(call, Mapping) and call.get("id")
                    waiting.append(given or call_id(number))
                    number, changed = number + 1, changed or not given
                fields["tool_calls"] = [
                    {**call, "id": name} if isinstance(call, Mapping) else call
                    for call, name in zip(calls, waiting, strict=True)
                ]
            elif message.role == "tool" and not fields.get("tool_call_id"):
                fields["tool_call_id"] = waiting.pop(0) if waiting else call_id(max(0, number - 1))
                changed = True
            messages.append(Message(message.role, message.content, fields))
        if not changed:
            return row
        return replace(row, messages=tuple(messages))

    def _note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1


def _good(found: Turn | Problem) -> Turn:
    """The turn. Raises TemplateError for what is wrong with it."""
    if isinstance(found, Problem):
        raise TemplateError(found)
    return found


def _after_same_message(last: Message, prompt: str, whole: str) -> str | None:
    """What follows the prompt's last message and header in a rendering whose older part differs; None if they do too.

    A template may drop older reasoning, or move a system message, once the answer is there. From the last message on
    prompt and rendering must then be the same, up to where the answer begins.
    """
    content = last.content.strip()
    start = prompt.rfind(content) if content else -1
    end = prompt[start:]
    if start < 0 or len(end.strip()) <= len(content):
        return None
    at = whole.rfind(end)
    return whole[at + len(end) :] if at >= 0 else None


def _channel_closed(place: str, shown: str) -> InstilError:
    """A turn with reasoning after a prompt that leaves no room for it."""
    what = f"the prompt closes the reasoning channel ({shown!r}) that this turn fills"
    remedy = "set chat.template_args={enable_thinking: true}, or remove the reasoning"
    return TemplateError.at(place, what, remedy, "channel-closed")


def _opens(rest: str, opening: str) -> bool:
    """Whether a turn begins with the channel that `opening` has closed already."""
    tag = re.match(r"\s*<[^<>]*>", opening)
    return tag is not None and rest.lstrip().startswith(tag.group().strip())


def _rewritten(prompt: str, whole: str) -> tuple[str, str]:
    """What and remedy for a rendering that does not begin with the prompt."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    same = next((i for i, (left, right) in pairs if left != right), min(len(prompt), len(whole)))
    what = (
        "the template rewrites the prompt once the answer is there, and shows no way to go on from it: "
        f"character {same} on, {prompt[same : same + 24]!r} becomes {whole[same : same + 24]!r}"
    )
    return what, "use --template FILE with one that appends each answer to the prompt"


def _placed(problem: Problem, place: str) -> Problem:
    """The problem with the row's place in front, where it only names the template."""
    if problem.place.startswith(place):
        return problem
    return Problem(place, f"{problem.what} ({problem.place})", problem.remedy, problem.rule)


def _called(calls: Any) -> Iterator[str]:
    """The names of the functions that `tool_calls` calls, and every text among their arguments."""
    for call in calls if isinstance(calls, (list, tuple)) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping):
            yield from (text for text in (function.get("name"), *_texts(function.get("arguments"))) if text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _written(text: str, body: str) -> bool:
    """Whether a template wrote this text, as it is or as JSON."""
    if text.strip() in body:
        return True
    import json

    return any(json.dumps(text, ensure_ascii=ascii_only)[1:-1] in body for ascii_only in (False, True))
