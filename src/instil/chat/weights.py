"""Whether each token of an example counts what its row, its message and the policy for its kind say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from instil.chat.readback import Fault
from instil.chat.targets import TERMINATOR, Targets
from instil.types import Conversation, Example

PLAIN = Targets()


def weight_faults(row: Conversation, example: Example, policy: Targets) -> Iterator[Fault]:
    """What is wrong with the weights of an example."""
    if not _plain(row, example, policy):
        yield from _faults(row, example, policy)


def _factor(row: Conversation, example: Example) -> float:
    """What a target of the example counts before any policy."""
    return row.messages[row.index_of(example.turn)].weight * row.weight


def _plain(row: Conversation, example: Example, policy: Targets) -> bool:
    """The usual case, quickly: every token counts what row and message say, and no policy makes a difference."""
    weights, kinds = example.weights, example.kinds
    if policy != PLAIN or row.pair is not None or not 0 < len(weights) == len(kinds) == len(example.answer_tokens):
        return False
    factor = np.float32(_factor(row, example))
    return bool(kinds[-1] == TERMINATOR and weights.min() == factor == weights.max() and 0 < factor < np.inf)


def _faults(row: Conversation, example: Example, policy: Targets) -> Iterator[Fault]:
    """Whether each token counts what the row, the message and the policy for its kind say."""
    weights = example.weights
    if len(weights) != len(example.answer_tokens):
        yield "weights-length", f"{len(weights)} weights for {len(example.answer_tokens)} answer tokens"
    if len(weights) and not (weights.min() >= 0 and weights.max() < np.inf):  # false for NaN too
        yield "weights-value", "a weight is negative or not finite"
    if not len(weights) or not weights[-1] > 0:
        yield (
            "weights-terminator",
            "the token that ends the answer has no weight: the model would not learn to stop",
        )
    if row.pair is not None or len(weights) != len(example.answer_tokens) or not len(weights):
        return
    if len(example.kinds) != len(weights) or example.kinds[-1] != TERMINATOR:
        yield "weights-kinds", "the kinds of the answer's tokens are not those of its weights"
        return
    factor = _factor(row, example)
    expected = policy.of_kinds()[example.kinds].astype(np.float64)
    if policy.per == "token":
        expected *= factor
    elif policy.turns != "everything":  # there the prompt's tokens have a share too
        expected *= factor / expected.sum()
    else:
        expected *= float(weights[-1]) / expected[-1]
    if not np.allclose(weights, expected, rtol=1e-4, atol=1e-9):
        yield "weights-policy", "the weights are not those of the row, the message and the kinds of tokens"
