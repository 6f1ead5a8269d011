"""A model or run measured on rows: the answers' loss, and their answers scored by exact rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from instil.chat.endings import Endings
from instil.chat.pairs import make_examples
from instil.chat.turns import ChatOptions
from instil.config import Config, load_config
from instil.data.mixture import load_conversations
from instil.data.spec import SourceSpec
from instil.errors import DataError, ModelError, UsageError
from instil.evaluate.generate import Sampling, generate
from instil.evaluate.likelihood import answer_loss
from instil.evaluate.tasks import Score, TaskSummary, score, summarise
from instil.explain import stored_sides
from instil.folder import Named, named
from instil.model.load import device_named, load_model, probe_window, refuse_absent_tokens, refuse_lengths
from instil.model.locate import locate
from instil.model.machine import set_up_machine
from instil.prepare import Chat, Prepared, open_chat, stop_texts
from instil.types import Conversation, Example

ALL = "all"  # the summary over every task
PACK_TOKENS = 1024  # of a forward pass without gradient


@dataclass(frozen=True)
class Ready:
    """A model to talk to: weights, tokenizer and template, and the tokens (or runs of tokens) that end an answer."""

    net: PreTrainedModel
    chat: Chat
    stop_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...] = ()


def open_model(name: str, *, device: str = "auto", template: str | None = None, base: bool = False) -> Ready:
    """Load the model that `name` (a run folder, or M) stands for, in bfloat16.

    base: with the weights that the run began from; tokenizer, template and what ends an answer stay the run's, so that
    both are asked the same.
    """
    set_up_machine(None)
    found = named(name, need_weights=True)
    weights = found.folder
    if base:
        if found.base is None:
            raise UsageError.at("--base", f"{name} is a model, not a run: it has no base", "name a run folder")
        weights = locate(found.base, need_weights=True)
    net = load_model(weights.path, dtype=torch.bfloat16, device=device_named(device))
    chat = open_chat(found.folder.path, template, args=template_args(found))
    config = GenerationConfig.from_pretrained(found.folder.path) if base else net.generation_config
    from_config = config.eos_token_id if config else None
    known = from_config if isinstance(from_config, list) else [from_config]
    endings = Endings(
        chat.template, chat.tokenizer, asked_terminator(found), stop_texts(found.folder.path, chat.tokenizer)
    )
    endings.look_at_calls()
    stops = dict.fromkeys(i for i in [*(ending.token_id for ending in endings.found), *known] if i is not None)
    sequences = [ending.token_ids for ending in endings.found if ending.token_id is None]
    return Ready(net, chat, tuple(stops), tuple(sequences))


def asked_terminator(found: Named) -> str | None:
    """What the user of a run said the server stops at."""
    return (
        load_config(found.run.config).chat.terminator if found.run is not None and found.run.config.exists() else None
    )


def template_args(found: Named) -> dict[str, Any]:
    """The template variables that a run was trained with; none for a model."""
    if found.run is None or not found.run.config.exists():
        return {}
    return dict(load_config(found.run.config).chat.template_args)


@dataclass(frozen=True)
class Answer:
    """One held-out example answered: what was expected, what the model said, whether that is exactly right."""

    origin: str
    task: str
    expected: str
    answer: str
    exact: bool


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per target token; tasks: by the rows' own `task`, and "all"; answers: one per generated example."""

    model: str
    examples: int
    target_tokens: int
    loss: float
    accuracy: float
    tasks: dict[str, TaskSummary]
    answers: list[Answer]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        found = asdict(self)
        for task, summary in self.tasks.items():
            found["tasks"][task]["exact_share"] = summary.exact_share
        return found


def evaluate(
    model: str,
    data: str | None = None,
    *,
    template: str | None = None,
    base: bool = False,
    rows: int | None = None,
    sampling: Sampling | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a run or model on the last answer of each row of `data` (default: the run's own held-out rows).

    The loss covers every answer; the exact rules (evaluate/tasks.py) score the generated last answer of each row.
    rows: only so many, from the start. sampling: its max_tokens, where None, is twice the longest expected answer, and at
    least 16. progress: called with (answers made, answers to make).
    Raises ModelError where the examples are longer than the model can be measured on exactly (model/load.py).
    """
    began = time.monotonic()
    found = named(model, need_weights=False)
    ready = open_model(model, device=device, template=template, base=base)
    examples = _examples(found, ready.chat, data)
    last = list({example.origin: example for example in examples}.values())[:rows]
    chosen = {example.origin for example in last}
    examples = [example for example in examples if example.origin in chosen]
    _refuse_unmeasurable(ready, examples, model)
    loss = answer_loss(ready.net, examples, pack_tokens=PACK_TOKENS)
    sampling = sampling or Sampling()
    if sampling.max_tokens is None:
        sampling = replace(sampling, max_tokens=max(16, 2 * max(len(e.answer_tokens) for e in last)))
    torch.manual_seed(0)  # for sampled answers
    tick = (lambda n: progress(n, len(last))) if progress else None
    made = generate(
        ready.net, [e.prompt_tokens for e in last], stop_ids=ready.stop_ids, sampling=sampling,
        stop_sequences=ready.stop_sequences, progress=tick,
    )  # fmt: skip
    decode = ready.chat.tokenizer.decode
    answers: list[Answer] = []
    scores: dict[str, list[Score]] = {}
    for example, tokens in zip(last, made, strict=True):
        expected, said = (decode(unended(t, ready), False) for t in (example.answer_tokens.tolist(), tokens))
        result = score(said, expected)
        answers.append(Answer(example.origin, example.task, expected, said, result.exact))
        scores.setdefault(example.task or "rows", []).append(result)
    if len(scores) > 1:
        scores[ALL] = [one for group in scores.values() for one in group]
    return Evaluation(
        model, len(examples), loss.target_tokens, loss.loss, loss.accuracy, summarise(scores), answers,
        time.monotonic() - began,
    )  # fmt: skip


def _refuse_unmeasurable(ready: Ready, examples: Sequence[Example], model: str) -> None:
    """Raise ModelError for examples with tokens that the model has not, or of lengths that it treats otherwise in a pack."""
    place = ready.chat.folder or model
    highest = max(int(tokens.max(initial=-1)) for e in examples for tokens in (e.prompt_tokens, e.answer_tokens))
    refuse_absent_tokens(ready.net, place, highest)
    longest = max(e.length_tokens for e in examples)
    try:
        refuse_lengths(ready.net.config, longest, place)
        probe_window(ready.net, place, longest)
    except ModelError as error:  # whose remedies are for training
        remedy = "leave such rows out, or use another model"
        raise ModelError(*(replace(problem, remedy=remedy) for problem in error.problems)) from None


def unended(tokens: Sequence[int], ready: Ready) -> Sequence[int]:
    """Without what ends the answer."""
    for ending in ready.stop_sequences:
        if tuple(tokens[-len(ending) :]) == ending:
            return tokens[: -len(ending)]
    return tokens[:-1] if tokens and tokens[-1] in ready.stop_ids else tokens


def _rows(found: Named, data: str) -> Sequence[Conversation]:
    """The rows of a file, read as the run read its own."""
    mapping = load_config(found.run.config).data.mapping if found.run is not None and found.run.config.exists() else {}
    return load_conversations([SourceSpec(data, mapping)]).conversations


def _options(found: Named, chat: Chat) -> ChatOptions:
    """Pairs as the run made them, but for their weights and length: every answer counts alike in a measurement."""
    stops = stop_texts(found.folder.path, chat.tokenizer)
    if found.run is None or not found.run.config.exists():
        return ChatOptions(stops=stops)
    config = load_config(found.run.config)
    return ChatOptions(control_text=config.chat.control_text, terminator=config.chat.terminator, stops=stops)


def _examples(found: Named, chat: Chat, data: str | None) -> list[Example]:
    """From a file, or the run's held-out side as it was prepared."""
    if data is not None:
        pairs = make_examples(_rows(found, data), chat.tokenizer, chat.template, _options(found, chat))
        if pairs.problems:
            raise DataError(*pairs.problems)
        if not pairs.examples:
            raise DataError.at(data, "no row has an answer with a weight above 0", "give rows to measure on", "no_rows")
        return pairs.examples
    if found.run is None:
        raise UsageError.at("--data", "a model has no held-out rows of its own", "give --data FILE")
    heldout = stored_sides(found.run)["heldout"]
    if not len(heldout):
        raise UsageError.at(found.run.path, "this run held no rows out", "give --data FILE")
    return list(heldout)


def heldout_measure(net: PreTrainedModel, data: Prepared, config: Config) -> Callable[[], float] | None:
    """The held-out loss during a run, always on the same first examples; None when nothing is held out."""
    if data.heldout is None:
        return None
    some = [data.heldout[i] for i in range(min(config.evaluate.examples, len(data.heldout)))]
    return lambda: answer_loss(net, some, pack_tokens=config.pack.tokens or 1).loss
