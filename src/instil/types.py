"""The nouns: Message, Conversation, Example, Pack, Batch; frozen values that flow from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # one thing under three names; the first is standard
Fate = Literal["used", "split", "cut", "dropped"]  # of a row (data/ledger.py); all but the last are used rows
FATES: tuple[Fate, ...] = get_args(Fate)
KINDS = ("answer", "reasoning", "tool_call", "terminator", "prompt")  # of a target token


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `fields` holds what else the row gave it (name, tool_calls, ...), for the template to see."""

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The mapping handed to the template: all but `weight`, which is said to us, not to a server."""
        others = {key: value for key, value in self.fields.items() if key != "weight"}
        return {"role": self.role, "content": self.content, **others}

    @property
    def weight(self) -> float:
        """How much an assistant message counts as an answer: its own `weight` field, or 1; 0 = context only."""
        return float(self.fields.get("weight", 1.0))

    @property
    def reasoning(self) -> str:
        """The reasoning that the row keeps apart from the content, "" if none."""
        return next((str(self.fields[name]) for name in REASONING_FIELDS if self.fields.get(name)), "")


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair that the user tokenised: taken as it is. weights: one for each answer token."""

    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row, or one branch of a row that is a tree of messages.

    origin = `file:line`; task = the row's own label, used to group reports ("" if none); weight = of every target of
    the row; template_args = the row's own variables for the template; first_turn = number of the first assistant
    message among those of the row (above 0 in the later branches of a tree); source = which of the sources it is from;
    pair = set instead of messages where the row is tokenised already.
    """

    messages: tuple[Message, ...]
    origin: str
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str = ""
    weight: float = 1.0
    template_args: Mapping[str, Any] = field(default_factory=dict)
    first_turn: int = 0
    source: int = 0
    pair: TokenPair | None = None

    def index_of(self, turn: int) -> int:
        """Which message is the answer of an assistant turn."""
        answers = [index for index, message in enumerate(self.messages) if message.role == "assistant"]
        return answers[turn - self.first_turn]


@dataclass(frozen=True, slots=True)
class Example:
    """A pair: the tokens the server puts in front of the model, and the tokens the model must then emit.

    prompt_tokens [p], answer_tokens [a], weights [a] (a token is a target where its weight is > 0), kinds [a] (index
    into KINDS). turn: which assistant turn of the row, counted from 0. cut_tokens: tokens of old turns that left the
    prompt so that the example fits. source: which of the sources it is from.
    """

    prompt_tokens: Int32
    answer_tokens: Int32
    weights: Float32
    origin: str
    turn: int
    task: str = ""
    kinds: Int8 = field(default_factory=lambda: np.zeros(0, np.int8))
    cut_tokens: int = 0
    source: int = 0

    @property
    def length_tokens(self) -> int:
        """Tokens the model computes for this pair: all but the last, which is only ever predicted."""
        return len(self.prompt_tokens) + len(self.answer_tokens) - 1


@dataclass(frozen=True, slots=True)
class Pack:
    """Examples laid out for one forward pass of n computed tokens and m losses.

    tokens [n]; positions [n] = depth of the token in its own example; reach [n] = one past the last index that may
    look at it: query q attends to key k exactly when k <= q < reach[k].
    Triples (at [m], target [m], weight [m]): the hidden state at `at` should predict `target`, counted `weight` times.
    owner [m] = which of `examples` (indices into the epoch's examples) the triple belongs to.
    cuts: of a pack that is too large to be computed at once: its first cuts[0] tokens, the trunk, which all examples begin
    with, are computed first, then each range between neighbouring cuts with them; () = at once.
    """

    tokens: Int32
    positions: Int32
    reach: Int32
    at: Int32
    target: Int32
    weight: Float32
    owner: Int32
    examples: tuple[int, ...]
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """The packs of one optimizer update, and the one number their summed loss is divided by."""

    step: int
    epoch: int
    packs: tuple[Pack, ...]
    weight_sum: float

    @property
    def target_tokens(self) -> int:
        """Triples with weight > 0."""
        return int(sum(np.count_nonzero(pack.weight) for pack in self.packs))

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(len(pack.tokens) for pack in self.packs)


def common_tokens(a: Int32, b: Int32) -> int:
    """How many first tokens of two sequences are the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
