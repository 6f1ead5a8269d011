"""A prefix tree trains as its pairs alone: loss and every gradient, whatever the examples share and wherever they branch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from instil.model.adapters import add_lora
from instil.pack import tree
from instil.pack.tree import build_pack
from instil.train.loss import learn
from instil.train.optim import MasterAdamW
from instil.train.step import step
from instil.types import Batch, Example, Pack

BACKENDS = ["instil_loop", "instil_dense"]
TOLERANCE = 1e-6  # in float64; transformers rounds norms, rotations and eager softmaxes to float32


# ── the examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


def example(prompt: Sequence[int], answer: Sequence[int], weights: Sequence[float] = (), row: int = 0) -> Example:
    counted = np.array(weights or [1.0] * len(answer), np.float32)
    return Example(np.array(prompt, np.int32), np.array(answer, np.int32), counted, f"x.jsonl:{row}", 0)


def some(n: int, key: int) -> list[int]:
    """n random tokens, a pure function of the key."""
    return np.random.default_rng(key).integers(3, 97, n).tolist()


def conversation(turns: int, key: int = 1) -> list[Example]:
    """Every turn begins with all of the turn before; the answers' weights are 1, 2, 0.5, and some are 0."""
    said, found = some(4, key), []
    for turn in range(turns):
        answer = some(3 + turn, 100 * key + turn)
        weights = [(1.0, 2.0, 0.5, 0.0)[(turn + j) % 4] for j in range(len(answer))]
        found.append(example(said, answer, weights, row=key))
        said = [*said, *answer, *some(3, 1000 * key + turn)]
    return found


def answers(key: int = 50) -> list[Example]:
    """Five answers to one prompt: two branch at once, two after two tokens, and one ends where another goes on."""
    prompt, begun = some(6, key), some(2, key + 1)
    return [
        example(prompt, [*begun, *some(4, key + 2)], [0.25, 1, 1, 3, 1, 1]),
        example(prompt, [*begun, *some(2, key + 3)]),
        example(prompt, begun, [1, 0.5]),
        example(prompt, some(5, key + 4)),
        example(prompt, some(1, key + 5), [2.0]),
    ]


def rewritten() -> list[Example]:
    """A template that takes the reasoning out of old turns: the second turn leaves the first in the middle of its answer."""
    asked, thought, said = some(5, 71), some(4, 72), some(3, 73)
    return [example(asked, [*thought, *said]), example([*asked, *said, *some(2, 74)], some(4, 75), [1, 0, 2, 1])]


def deep(levels: int = 6) -> list[Example]:
    """Two branches at every level of a tree, so that the last examples have a branch point at each of their depths."""
    found, path = [], some(2, 200)
    for level in range(levels):
        found.append(example(path, some(3, 210 + level), [1.0, 0.5, 2.0], row=level))
        path = [*path, *some(2, 220 + level)]
    return [*found, example(path, some(2, 230))]


CASES: dict[str, list[Example]] = {
    "conversation": conversation(4),
    "answers": answers(),
    "rewritten": rewritten(),
    "deep": deep(),
    "copies": [*answers()[:3], *answers()[1:2], *conversation(2), *conversation(2)],
    "forest": [*conversation(3), *answers(), *conversation(2, key=2), *rewritten(), *deep(3), example([5], [6])],
}


# ── the two ways to train ────────────────────────────────────────────────────────────────────────────────────────────

Found = tuple[float, dict[str, torch.Tensor]]


def gradients(net: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad and p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def alone(net: Any, examples: Sequence[Example]) -> Found:
    """Each pair by itself through transformers' own model with its own eager attention; the sum of weight * nll."""
    net = copy.deepcopy(net)
    net.set_attn_implementation("eager")
    total = 0.0
    for e in examples:
        tokens = torch.tensor([[*e.prompt_tokens.tolist(), *e.answer_tokens.tolist()]])
        logits = net(input_ids=tokens, use_cache=False).logits[0, len(e.prompt_tokens) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, tokens[0, len(e.prompt_tokens) :], reduction="none")
        loss = (nll * torch.tensor(e.weights.tolist(), dtype=nll.dtype)).sum()
        loss.backward()
        total += float(loss.detach())
    return total, gradients(net)


def in_packs(net: Any, packs: Sequence[Pack]) -> Found:
    """Through instil, not divided."""
    total = 0.0
    for pack in packs:
        total += float(learn(net, pack, 1.0).share.detach())
    return total, gradients(net)


def check(found: Found, expected: Found) -> None:
    """The losses agree, and every parameter's gradient in norm, relative to its own."""
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float(gradient.norm()) > 0, name
        assert float((found[1][name] - gradient).norm()) <= TOLERANCE * float(gradient.norm()), name


@pytest.fixture(scope="module")
def nets(tiny: Any) -> Callable[..., Any]:
    """A tiny model in float64, with an adapter of rank 3 or all of it to train."""

    def make(kind: str, backend: str, *, rank: int = 0) -> Any:
        net = tiny(kind, attention=backend)
        if rank:
            add_lora(net, SimpleNamespace(rank=rank, alpha=None, targets=[]), "base", 0)
            with torch.no_grad():
                for p in net.parameters():
                    if p.requires_grad:
                        p.copy_(0.2 * torch.randn_like(p))  # B = 0 would leave A without a gradient
        return net.double()

    return make


# ── the proof ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 3], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_tree_is_its_pairs_one_by_one(case: str, rank: int, backend: str, nets: Any) -> None:
    """Loss and gradients of the tree are the sums of those of every pair trained alone, to 1e-6."""
    net, examples = nets("llama", backend, rank=rank), CASES[case]
    pack = build_pack(examples, range(len(examples)))
    assert len(pack.tokens) < sum(e.length_tokens for e in examples), "the oracle must see something shared"
    check(in_packs(net, [pack]), alone(net, examples))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3", "gpt2"])
def test_a_tree_of_other_models_is_its_pairs_one_by_one(kind: str, backend: str, nets: Any) -> None:
    """Tied embeddings, norms on queries and keys, learned positions."""
    net, examples = nets(kind, backend), CASES["forest"]
    check(in_packs(net, [build_pack(examples, range(len(examples)))]), alone(net, examples))


def below_a_trunk() -> list[Example]:
    """Conversations, answers and deep branches below 130 tokens that all begin with, one of them an answer itself."""
    head = some(130, 500)
    below = [*conversation(3), *answers(), *deep(3)]
    long = [replace(e, prompt_tokens=np.concatenate([np.array(head, np.int32), e.prompt_tokens])) for e in below]
    return [example(head[:100], head[100:120], [0.5] * 20), *long]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 3], ids=["full", "lora"])
@pytest.mark.parametrize("group", [12, 40])
def test_a_tree_in_parts_is_its_pairs_one_by_one(
    group: int, rank: int, backend: str, nets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack too large to be computed at once: its trunk, then groups of branches, to the same loss and gradients."""
    monkeypatch.setattr(tree, "LEAST_GROUP", group)
    net, examples = nets("llama", backend, rank=rank), below_a_trunk()
    pack = build_pack(examples, range(len(examples)), 130)
    assert pack.cuts[0] == 130
    assert len(pack.cuts) >= 3, "the oracle must see several groups"
    assert pack.cuts[-1] == len(pack.tokens)
    check(in_packs(net, [pack]), alone(net, examples))


def test_a_group_of_branches_left_out_is_caught(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison fails when the last group is not computed."""
    monkeypatch.setattr(tree, "LEAST_GROUP", 12)
    net, examples = nets("llama", "instil_loop"), below_a_trunk()
    pack = build_pack(examples, range(len(examples)), 12)
    with pytest.raises(AssertionError):
        check(in_packs(net, [replace(pack, cuts=pack.cuts[:-1])]), alone(net, examples))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_any_cut_of_the_examples_into_trees_is_their_pairs_one_by_one(seed: int, backend: str, nets: Any) -> None:
    """The forest's examples in any order, cut into three packs: what is shared changes, what is learnt does not."""
    net, examples = nets("llama", backend), CASES["forest"]
    order = np.random.default_rng(seed).permutation(len(examples))
    packs = [build_pack([examples[i] for i in part], part.tolist()) for part in np.array_split(order, 3)]
    check(in_packs(net, packs), alone(net, examples))


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────


def fan() -> tuple[list[Example], Pack]:
    """Three answers of two tokens to a prompt of four: the tree is 0 1 2 3 and the leaves 4, 5 and 6."""
    prompt = some(4, 300)
    examples = [example(prompt, [10 * k, k]) for k in (1, 2, 3)]
    pack = build_pack(examples, range(3))
    assert pack.reach.tolist() == [7, 7, 7, 7, 5, 6, 7]
    return examples, pack


def reaching(pack: Pack, at: int | slice, by: int) -> Pack:
    reach = pack.reach.copy()
    reach[at] += by
    return replace(pack, reach=reach)


def without_a_branchs_triple(pack: Pack) -> Pack:
    """At the branch point, which has one for each branch."""
    point = Counter(pack.at.tolist()).most_common(1)[0]
    assert point == (3, 3)
    kept = np.arange(len(pack.at)) != np.flatnonzero(pack.at == 3)[1]
    return replace(pack, **{f: getattr(pack, f)[kept] for f in ("at", "target", "weight", "owner")})


def restarted(pack: Pack) -> Pack:
    """The branches' positions count from 0."""
    positions = pack.positions.copy()
    positions[4:] -= 4
    return replace(pack, positions=positions)


FAULTS: dict[str, Callable[[Pack], Pack]] = {
    "a branch's triple dropped": without_a_branchs_triple,
    "reach one too far": lambda pack: reaching(pack, 4, 1),  # the first leaf reaches over the second
    "reach one too short": lambda pack: reaching(pack, slice(0, 4), -1),  # the last leaf does not see the prompt
    "a branch restarted": restarted,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_tree_is_caught(fault: str, backend: str, nets: Any) -> None:
    """The same comparison holds for the right tree, and fails for each fault."""
    net = nets("llama", backend)
    examples, pack = fan()
    expected = alone(net, examples)
    check(in_packs(net, [pack]), expected)
    with pytest.raises(AssertionError):
        check(in_packs(net, [FAULTS[fault](pack)]), expected)


@pytest.mark.parametrize(("at", "by"), [(0, -1), (2, -1), (2, 1), (5, -1)])
def test_a_reach_that_makes_no_tree_is_refused(at: int, by: int, nets: Any) -> None:
    """One token that reaches less far than what is below it, or into the middle of what is not, is a bug that speaks."""
    with pytest.raises((ValueError, AssertionError)):
        learn(nets("llama", "instil_loop"), reaching(fan()[1], at, by), 1.0)


# ── a whole step ─────────────────────────────────────────────────────────────────────────────────────────────────────


def batch_of(packs: Sequence[Pack]) -> Batch:
    return Batch(0, 0, tuple(packs), float(sum(pack.weight.sum(dtype=np.float64) for pack in packs)))


def updated(net: Any, packs: Sequence[Pack]) -> tuple[Any, dict[str, torch.Tensor]]:
    """One step at a rate of 0.01 with clipping and decay, on a copy: what it reports, and the parameters after it.

    A step at rate 0 on other examples comes before: AdamW's very first takes little but the sign of each gradient, which
    rounding decides where a gradient is nearly 0.
    """
    net = copy.deepcopy(net).float()
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.1)
    step(net, optimizer, batch_of([build_pack([example(some(60, 400), some(60, 401))], [0])]), lr=0.0, clip_norm=1.0)
    stats = step(net, optimizer, batch_of(packs), lr=0.01, clip_norm=1.0)
    return stats, {n: p.detach().clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 3], ids=["full", "lora"])
def test_a_step_on_trees_is_the_step_on_the_examples_apart(rank: int, backend: str, nets: Any) -> None:
    """The same loss, gradient norm and counts, and the same update of every parameter, to 1e-6 of the parameter."""
    net, examples = nets("llama", backend, rank=rank), CASES["forest"]
    cut = np.array_split(np.arange(len(examples)), 3)
    trees = [build_pack([examples[i] for i in part], part.tolist()) for part in cut]
    apart = [build_pack([e], [i]) for i, e in enumerate(examples)]
    (found, after), (expected, alone_after) = updated(net, trees), updated(net, apart)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
    assert (found.accuracy, found.target_tokens) == (expected.accuracy, expected.target_tokens)
    assert found.computed_tokens < expected.computed_tokens == sum(e.length_tokens for e in examples)
    before = dict(net.named_parameters())
    moved = 0
    for name, parameter in after.items():
        error = float((parameter - alone_after[name]).norm())
        assert error <= TOLERANCE * float(parameter.norm()), name
        moved += not torch.equal(parameter, before[name].float())
    assert moved == sum(p.requires_grad for p in before.values())
