"""A row in, its dialogues out: one function a format, one table of formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from instil.data.jsontext import kind
from instil.data.mapping import described, read_mapped
from instil.data.messages import Parts, message_list, not_learnt, sharegpt_message
from instil.data.notes import Tally
from instil.data.suggest import ANSWER_NAMES, CONTEXT_NAMES, PROMPT_NAMES
from instil.data.tokenised import read_labels, read_token_pair
from instil.data.trees import is_tree, read_tree
from instil.errors import Problem
from instil.types import Message, TokenPair

Dialogue = Parts | TokenPair
Value = Mapping[str, Any]  # the value of a row

HANDLED = {"system", "tools", "task", "weight", "template_args", "chat_template_kwargs"}


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write conversations as a row. needs: the keys that identify it. shape: an example for people.

    read: the row's value and origin in, its dialogues out; what else the user should hear goes into the tally.
    fits: what the keys alone do not show.
    """

    name: str
    needs: tuple[str, ...]
    shape: str
    read: Callable[[Value, str, Tally], list[Dialogue]]
    fits: Callable[[Value], bool] = lambda value: True


def recognise(value: Value) -> Format | None:
    """The first format of the table whose keys the row has; or two columns that can only be prompt and answer."""
    for format in FORMATS:
        if all(key in value for key in format.needs) and format.fits(value):
            return format
    return _evident(value)


# One function a format: the row and its origin in, its dialogues out.


def read_messages(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
    """OpenAI: {"messages": [{"role", "content", ...}]}. Other keys of a message are kept for the template."""
    return [message_list(value["messages"], f"{origin}: messages")]


def read_sharegpt(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
    """ShareGPT: {"conversations": [{"from", "value"}]}, with function_call and observation turns."""
    return [message_list(value["conversations"], f"{origin}: conversations", sharegpt_message)]


def read_prompt_completion(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
    """{"prompt", "completion"}: two texts, or two lists of messages of which only the completion is learnt."""
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return read_two_texts(value, origin, tally, "prompt", "completion")
    place = f"{origin}: completion"
    if not isinstance(prompt, list) or not isinstance(completion, list):
        what = f"is {kind(completion)} while prompt is {kind(prompt)}"
        return [[Problem(place, what, "make both text, or both lists of messages", "content")]]
    if not completion:
        return [[Problem(place, "is an empty list", "add the answer, or remove the row", "no_answer")]]
    answers = message_list(completion, place)
    if answers and isinstance(answers[0], Message) and answers[0].role != "assistant":
        what = f"{answers[0].role!r} cannot begin an answer"
        answers[0] = Problem(f"{place}[0].role", what, "move the message to the prompt", "role")
    return [[*(not_learnt(part) for part in message_list(prompt, f"{origin}: prompt")), *answers]]


def read_alpaca(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
    """Alpaca: {"instruction", "input", "output", "history"}; the input follows the instruction after an empty line."""
    parts: Parts = [_text(value, "instruction", "user", origin), _text(value, "output", "assistant", origin)]
    extra = value.get("input")
    if isinstance(extra, str):
        if extra.strip() and isinstance(parts[0], Message):
            parts[0] = Message("user", f"{parts[0].content}\n\n{extra}")
    elif extra is not None:
        parts.append(Problem(f"{origin}: input", f"is {kind(extra)}, not text", "write it as text", "content"))
    return [[*_history(value.get("history"), f"{origin}: history"), *parts]]


def read_instances(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
    """Self-instruct: {"instruction", "instances": [{"input", "output"}]}: a conversation for each instance."""
    instances, place = value["instances"], f"{origin}: instances"
    if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
        what = f"is {kind(instances)}" if not isinstance(instances, list) else "holds more than objects"
        return [[Problem(place, what, 'write [{"input": ..., "output": ...}]', "content")]]
    dialogues: list[Dialogue] = []
    for i, each in enumerate(instances):
        if "output" not in each:
            remedy = "add it, or remove the instance"
            dialogues.append([Problem(f"{place}[{i}].output", "is missing", remedy, "missing_field")])
            continue
        row = {"instruction": value["instruction"], "input": each.get("input"), "output": each["output"]}
        dialogues += read_alpaca(row, origin, tally)
    return dialogues


def read_two_texts(value: Value, origin: str, tally: Tally, prompt: str, answer: str) -> list[Dialogue]:
    """Two columns with a text each: what is asked and what is answered."""
    return [[_text(value, prompt, "user", origin), _text(value, answer, "assistant", origin)]]


def _tree(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
    return list(read_tree(value, origin, tally))


def _tokens(
    value: Value, origin: str, tally: Tally, read: Callable[[Value, str], TokenPair | list[Problem]]
) -> list[Dialogue]:
    found = read(value, origin)
    return [found if isinstance(found, TokenPair) else list(found)]


FORMATS = (
    Format(
        "messages",
        ("messages",),
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        read_messages,
    ),
    Format(
        "conversations",
        ("conversations",),
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        read_sharegpt,
    ),
    Format(
        "message tree",
        ("prompt",),
        '{"prompt": {"role": "prompter", "text": "...", "replies": [{"role": "assistant", "text": "..."}]}}',
        _tree,
        is_tree,
    ),
    Format(
        "prompt-completion", ("prompt", "completion"), '{"prompt": "...", "completion": "..."}', read_prompt_completion
    ),
    Format("alpaca", ("instruction", "output"), '{"instruction": "...", "input": "...", "output": "..."}', read_alpaca),
    Format(
        "instruction with instances",
        ("instruction", "instances"),
        '{"instruction": "...", "instances": [{"input": "...", "output": "..."}]}',
        read_instances,
    ),
    Format(
        "token pairs",
        ("prompt_tokens", "answer_tokens"),
        '{"prompt_tokens": [1, 2], "answer_tokens": [3]}',
        partial(_tokens, read=read_token_pair),
    ),
    Format(
        "token labels",
        ("input_ids", "labels"),
        '{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}',
        partial(_tokens, read=read_labels),
    ),
)
SHOWN_FORMATS = ("messages", "conversations", "prompt-completion", "alpaca")  # in an error; the others are in the docs


def _evident(value: Value) -> Format | None:
    """Two columns with a text each of which one can only be the prompt, the other only the answer; nothing beside."""
    prompts = [name for name in PROMPT_NAMES if name in value]
    answers = [name for name in ANSWER_NAMES if name in value]
    if len(prompts) != 1 or len(answers) != 1 or any(name in value for name in CONTEXT_NAMES):
        return None
    prompt, answer = prompts[0], answers[0]
    if not isinstance(value[prompt], str) or not isinstance(value[answer], str):
        return None
    unread = [str(name) for name in value if name not in (prompt, answer) and name not in HANDLED]
    name = f"{prompt} = prompt, {answer} = answer" + (f" (not read: {', '.join(unread)})" if unread else "")
    return Format(name, (prompt, answer), "", partial(read_two_texts, prompt=prompt, answer=answer))


def mapped(mapping: Mapping[str, Any]) -> Format:
    """The format that a mapping describes. It needs no keys: what is missing is said by the reader."""

    def read(value: Value, origin: str, tally: Tally) -> list[Dialogue]:
        return [read_mapped(value, origin, mapping, tally)]

    return Format(f"mapped ({described(mapping)})", (), "", read)


# What the formats share.


def _text(value: Value, key: str, role: str, origin: str) -> Message | Problem:
    if not isinstance(value[key], str):
        return Problem(f"{origin}: {key}", f"is {kind(value[key])}, not text", "write it as text", "content")
    return Message(role, value[key])


def _history(raw: Any, place: str) -> Parts:
    """Earlier turns as [[question, answer], ...]: answers like the last one."""
    if raw in (None, "", []):
        return []
    if not isinstance(raw, list):
        return [Problem(place, f"is {kind(raw)}, not a list", "write it as [[question, answer], ...]", "content")]
    parts: Parts = []
    for i, turn in enumerate(raw):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            what = "is not a question and an answer"
            parts.append(Problem(f"{place}[{i}]", what, "write it as [question, answer], two texts", "content"))
        else:
            parts += [Message("user", turn[0]), Message("assistant", turn[1])]
    return parts
