"""Only answers teach: leaving the prompt out of the loss, weighting it 0 and not computing its logits are one thing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from instil.model.head import Head, Triples, weighted_nll
from instil.pack.tree import build_pack
from instil.types import Example, Pack

Found = tuple[float, dict[str, Tensor]]


def textbook_logits(net: Any, example: Example) -> tuple[Any, Tensor, Tensor]:
    """A copy of the model with its own attention, its logits of the whole example, and the tokens."""
    model = copy.deepcopy(net)
    model.set_attn_implementation("eager")
    model.zero_grad(set_to_none=True)
    tokens = torch.tensor(np.concatenate([example.prompt_tokens, example.answer_tokens]), dtype=torch.int64)
    return model, model(input_ids=tokens[None], use_cache=False).logits[0], tokens


def backward(model: Any, loss: Tensor) -> Found:
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def ignored(net: Any, example: Example) -> Found:
    """Labels of -100 at the prompt, the sum of the rest over their count."""
    model, logits, tokens = textbook_logits(net, example)
    labels = tokens.clone()
    labels[: len(example.prompt_tokens)] = -100
    total = cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return backward(model, total / len(example.answer_tokens))


def zero_weighted(net: Any, example: Example) -> Found:
    """A loss at every position, times 0 at the prompt's and 1 at the answer's."""
    model, logits, tokens = textbook_logits(net, example)
    weights = (torch.arange(1, len(tokens)) >= len(example.prompt_tokens)).float()
    each = cross_entropy(logits[:-1], tokens[1:], reduction="none")
    return backward(model, (weights * each).sum() / weights.sum())


def sliced(net: Any, example: Example) -> Found:
    """Logits of the answer's positions only."""
    model, logits, tokens = textbook_logits(net, example)
    p = len(example.prompt_tokens)
    return backward(model, cross_entropy(logits[p - 1 : -1], tokens[p:]))


def transformers_own(net: Any, example: Example) -> Found:
    """transformers' loss for labels of -100 at the prompt."""
    model = copy.deepcopy(net)
    model.set_attn_implementation("eager")
    tokens = torch.tensor(np.concatenate([example.prompt_tokens, example.answer_tokens]), dtype=torch.int64)
    labels = tokens.clone()
    labels[: len(example.prompt_tokens)] = -100
    return backward(model, model(input_ids=tokens[None], labels=labels[None], use_cache=False).loss)


TEXTBOOKS = [ignored, zero_weighted, sliced, transformers_own]


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("formula", TEXTBOOKS)
def test_triples_are_the_masked_the_zero_weighted_and_the_sliced_loss(
    formula: Callable[..., Found], kind: str, tiny: Any, some_examples: Any, gradients_of: Any, assert_same: Any
) -> None:
    """Loss and every parameter's gradient are those of all four ways in which books write it."""
    net = tiny(kind)
    (example,) = some_examples(lengths=[(9, 5)])
    assert_same(gradients_of(net, [build_pack([example], [0])]), formula(net, example))


def one_later(pack: Pack) -> Pack:
    return replace(pack, at=np.minimum(pack.at + 1, len(pack.tokens) - 1))


def targets_are_inputs(pack: Pack) -> Pack:
    return replace(pack, target=pack.tokens[pack.at])


def first_prompt_token_too(pack: Pack) -> Pack:
    """One target more than there should be: the prompt's second token."""
    return replace(
        pack,
        at=np.append(pack.at, np.int32(0)),
        target=np.append(pack.target, pack.tokens[1]),
        weight=np.append(pack.weight, np.float32(1)),
    )


def last_answer_token_missing(pack: Pack) -> Pack:
    return replace(pack, at=pack.at[:-1], target=pack.target[:-1], weight=pack.weight[:-1])


@pytest.mark.parametrize("fault", [one_later, targets_are_inputs, first_prompt_token_too, last_answer_token_missing])
def test_a_wrong_triple_is_caught(
    fault: Callable[[Pack], Pack], tiny: Any, some_examples: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison catches a shift by one, inputs as targets, one prompt token too many, one answer token less."""
    net = tiny()
    (example,) = some_examples(lengths=[(9, 5)])
    broken = gradients_of(net, [fault(build_pack([example], [0]))])
    for formula in TEXTBOOKS:
        with pytest.raises(AssertionError):
            assert_same(broken, formula(net, example), tolerance=1e-2)


# --- the share of the gradient that prompts take


def triples_loss(hidden: Tensor, head: Head, tokens: Tensor, pack: Pack) -> Tensor:
    return weighted_nll(hidden, head, Triples.of_pack(pack, hidden.device)).nll / float(pack.weight.sum())


def every_token_loss(hidden: Tensor, head: Head, tokens: Tensor, pack: Pack) -> Tensor:
    """The loss of pretraining: every next token, prompt or answer."""
    return cross_entropy(head.logits(hidden), tokens[1:])


def prompt_share(loss: Callable[..., Tensor], make_example: Any) -> float:
    """The prompt's share of the summed gradient norms, where every token's gradient is literally the same.

    80 prompt tokens and 20 answer tokens, all of them token 3, after one start token, so that each of the 100 is
    predicted from the position before it; every position has the same hidden state.
    """
    example = make_example([3] * 81, [3] * 20)
    pack = build_pack([example], [0])
    torch.manual_seed(0)
    hidden = torch.randn(1, 8).repeat(100, 1).requires_grad_()
    assert len(pack.tokens) == 100
    loss(hidden, Head(torch.randn(11, 8), None), torch.full((101,), 3), pack).backward()
    norms = hidden.grad.norm(dim=1).numpy()
    assert len({float(n) for n in norms if n}) == 1, "the gradients are not equal"
    return float(norms[:80].sum() / norms.sum())


def test_prompts_take_no_share_of_the_gradient(make_example: Any) -> None:
    """With a loss on every token, 80 prompt tokens take 80% of the gradient and 20 answer tokens 20%; with ours, 0%."""
    assert prompt_share(every_token_loss, make_example) == pytest.approx(0.8, abs=1e-6)
    assert prompt_share(triples_loss, make_example) == 0.0


def test_a_loss_on_every_token_is_caught(make_example: Any) -> None:
    """The check of 0% fails for the loss of pretraining."""
    with pytest.raises(AssertionError):
        assert prompt_share(every_token_loss, make_example) == 0.0


def test_the_last_token_and_the_first_prompt_token_have_no_logits(some_examples: Any) -> None:
    """What is never computed cannot teach: the last token of an example is no input, and no prompt token is a target."""
    (example,) = some_examples(lengths=[(9, 5)])
    pack = build_pack([example], [0])
    assert len(pack.tokens) == 13
    assert pack.at.min() == 8  # the last prompt token predicts the first answer token
    assert pack.at.max() == 12
