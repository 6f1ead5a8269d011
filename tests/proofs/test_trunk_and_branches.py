"""A pack computed in parts, its trunk once and its branches in turn, learns what the whole pack learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from instil.model.adapters import add_lora
from instil.model.attention import attention
from instil.model.memory import compute_layers_again, computes_layers_again
from instil.model.tree_attention import tree_attention
from instil.pack import tree
from instil.pack.tree import build_pack
from instil.train import trunk
from instil.train.loss import learn, pack_loss, pack_nll
from instil.types import Example, Pack

TOLERANCE = 1e-6  # in float64; transformers rounds norms and rotations to float32


def example(prompt: list[int], answer: list[int], weights: list[float] | None = None) -> Example:
    counted = np.array(weights or [1.0] * len(answer), np.float32)
    return Example(np.array(prompt, np.int32), np.array(answer, np.int32), counted, "x.jsonl:1", 0)


def some(n: int, key: int) -> list[int]:
    return np.random.default_rng(key).integers(3, 97, n).tolist()


def examples() -> list[Example]:
    """A schema, questions with one to three answers, one of them a turn later, and an answer to the schema alone."""
    schema = some(9, 0)
    found = [example(schema, some(3, 1), [1.0, 0.5, 2.0])]
    for question in range(5):
        asked = [*schema, *some(2 + question, 10 + question)]
        for answer in range(1 + question % 3):
            found.append(example(asked, some(3 + answer, 100 + 10 * question + answer)))
    later = [*found[2].prompt_tokens.tolist(), *found[2].answer_tokens.tolist(), *some(3, 5)]
    return [*found, example(later, some(4, 6), [3.0, 1.0, 0.0, 1.0])]


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Pack:
    """The pack of `examples`, cut into its trunk and groups of branches of at most 14 tokens."""
    monkeypatch.setattr(tree, "LEAST_TRUNK", 4)
    monkeypatch.setattr(tree, "LEAST_GROUP", 4)
    pack = build_pack(examples(), range(len(examples())), 14)
    assert pack.cuts[0] == 9
    assert len(pack.cuts) > 3
    assert pack.cuts[-1] == len(pack.tokens)
    return pack


Found = tuple[float, int, float, dict[str, torch.Tensor]]


def learnt(net: Any, pack: Pack, weight_sum: float = 7.0) -> Found:
    net.zero_grad()
    found = learn(net, pack, weight_sum)
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return float(found.share.detach()), int(found.right), float(found.entropy), gradients


def same(found: Found, expected: Found) -> bool:
    """Loss, counts, and every gradient in norm, relative to its own."""
    if found[0] != pytest.approx(expected[0], rel=TOLERANCE) or found[1] != expected[1]:
        return False
    if found[2] != pytest.approx(expected[2], rel=TOLERANCE) or found[3].keys() != expected[3].keys():
        return False
    return all(
        float((found[3][name] - gradient).norm()) <= TOLERANCE * float(gradient.norm())
        for name, gradient in expected[3].items()
    )


def model(tiny: Any, kind: str, rank: int = 0) -> Any:
    net = tiny(kind).double().train()
    if not rank:
        return net

    class Settings:
        alpha, targets = None, []

    Settings.rank = rank
    adapted = add_lora(net, Settings, "tiny", 0).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10
    return net  # changed in place


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("implementation", ["instil_loop", "instil_dense"])
def test_parts_learn_what_the_whole_learns(tiny: Any, cut: Pack, kind: str, implementation: str) -> None:
    """Loss, first choices, entropy and every gradient; mistral's window of 8 is shorter than the trunk."""
    net = model(tiny, kind)
    with attention(net, implementation):
        assert same(learnt(net, cut), learnt(net, replace(cut, cuts=())))


def test_an_adapter_learns_the_same(tiny: Any, cut: Pack) -> None:
    """LoRA: the base is frozen, the trunk's keys still carry gradients to the adapters."""
    net = model(tiny, "llama", rank=3)
    expected = learnt(net, replace(cut, cuts=()))
    assert all("lora" in name for name in expected[3])
    assert same(learnt(net, cut), expected)


@pytest.mark.parametrize("rank", [0, 3])
def test_layers_computed_again_learn_the_same(tiny: Any, cut: Pack, rank: int) -> None:
    """Only the inputs of layers are kept: the same numbers to the bit, for the whole pack and in parts."""
    net = model(tiny, "llama", rank)
    for pack in (cut, replace(cut, cuts=())):
        expected = learnt(net, pack)
        compute_layers_again(net)
        found = learnt(net, pack)
        assert computes_layers_again(net)
        for module in net.modules():
            if computes_layers_again(module):
                module.gradient_checkpointing = False
        assert found[:3] == expected[:3]
        assert all(torch.equal(found[3][name], gradient) for name, gradient in expected[3].items())


def test_an_evaluation_gives_the_same(tiny: Any, cut: Pack) -> None:
    """Without gradients, the trunk once and the branches in turn."""
    net = model(tiny, "llama")
    with torch.no_grad():
        found, expected = pack_nll(net, cut), pack_nll(net, replace(cut, cuts=()))
    assert float(found.nll) == pytest.approx(float(expected.nll), rel=TOLERANCE)
    assert int(found.right) == int(expected.right)
    assert all(p.grad is None for p in net.parameters())


def test_no_pass_has_more_than_the_trunk_or_a_group(tiny: Any, cut: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes through the model at one time: the trunk, then each group, each token once."""
    net, sizes = model(tiny, "llama"), []
    real = trunk.hidden_states

    def watch(net: Any, pack: Pack, layout: Any) -> Any:
        sizes.append(len(pack.tokens))
        return real(net, pack, layout)

    monkeypatch.setattr(trunk, "hidden_states", watch)
    learnt(net, cut)
    assert sizes == [9, *np.diff(cut.cuts).tolist()]
    assert sum(sizes) == len(cut.tokens)


def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the branches' gradients do not reach the trunk."""
    monkeypatch.setattr(trunk._Leaf, "gradients", lambda self: iter(()))


def last_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: only the last group's gradient reaches the trunk."""

    def collector(self: Any, i: int) -> Any:
        def collect(leaf: Any) -> None:
            self.sums[i], leaf.grad = leaf.grad, None

        return collect

    monkeypatch.setattr(trunk._Leaf, "_collector", collector)


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the branches do not look at the trunk."""

    def alone(query: Any, key: Any, value: Any, layout: Any, kernel: Any, **rest: Any) -> Any:
        n = layout.given_tokens
        key, value = (torch.cat([x[:, :, :n].detach() * 0, x[:, :, n:]], 2) for x in (key, value))
        return tree_attention(query, key, value, layout, kernel, **rest)

    monkeypatch.setattr("instil.model.attention.tree_attention", alone)


@pytest.mark.parametrize("fault", [forgotten, last_only, unseen])
def test_planted_faults_are_caught(tiny: Any, cut: Pack, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails with each of them."""
    net = model(tiny, "llama")
    expected = learnt(net, replace(cut, cuts=()))
    assert same(learnt(net, cut), expected)
    fault(monkeypatch)
    assert not same(learnt(net, cut), expected)


def test_a_pack_with_cuts_divides_its_loss_as_others_do(tiny: Any, cut: Pack) -> None:
    """By the batch's weight sum, whatever it is."""
    net = model(tiny, "llama")
    whole = float(pack_loss(net, replace(cut, cuts=()), 11.0).share.detach())
    assert learnt(net, cut, 11.0)[0] == pytest.approx(whole, rel=TOLERANCE)


def test_which_packs_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are larger than the limit and begin alike for long enough; a branch is never cut."""
    monkeypatch.setattr(tree, "LEAST_TRUNK", 4)
    monkeypatch.setattr(tree, "LEAST_GROUP", 4)
    every = examples()
    size = len(build_pack(every, range(len(every))).tokens)
    assert build_pack(every, range(len(every)), size).cuts == ()
    assert build_pack([every[0]], [0], 3).cuts == ()
    assert build_pack([*every, example(some(5, 77), some(2, 78))], range(len(every) + 1), 14).cuts == ()
    monkeypatch.setattr(tree, "LEAST_TRUNK", 10)
    assert build_pack(every, range(len(every)), 14).cuts == ()
    monkeypatch.setattr(tree, "LEAST_TRUNK", 4)
    monkeypatch.setattr(tree, "LEAST_GROUP", 4)
    for limit in (1, 5, 14, 30):
        pack = build_pack(every, range(len(every)), limit)
        branches = np.flatnonzero(pack.positions == 9).tolist()
        assert set(pack.cuts[1:-1]) <= set(branches)
        for a, b in zip(pack.cuts[:-1], pack.cuts[1:], strict=True):
            assert b - a <= limit or sum(a <= x < b for x in branches) == 1
