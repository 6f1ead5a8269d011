"""bf16 training loses nothing: gradients are summed, and small updates kept, in float32; AdamW is the textbook's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instil.pack.tree import build_pack
from instil.train.loss import pack_loss
from instil.train.optim import MasterAdamW

BF16, FP32 = torch.bfloat16, torch.float32


class Weights(nn.Module):
    """One matrix and one vector."""

    def __init__(self, matrix: Tensor, vector: Tensor):
        super().__init__()
        self.matrix, self.vector = nn.Parameter(matrix), nn.Parameter(vector)


def weights(value: float = 1.0) -> Weights:
    return Weights(torch.full((2, 3), value), torch.full((3,), value))


# --- gradient sums


def summed_by_master(parts: list[float]) -> float:
    """The sum of gradients as MasterAdamW makes it over several backward passes of one step."""
    net = weights()
    optimizer = MasterAdamW(net, dtype=BF16, weight_decay=0.0)
    optimizer.zero()
    for part in parts:
        (net.matrix * part).sum().backward()
    optimizer.grad_norm()
    gradient = optimizer.masters["matrix"].grad
    assert gradient is not None
    assert gradient.dtype == FP32
    assert len(set(gradient.flatten().tolist())) == 1
    return float(gradient[0, 0])


def summed_by_autograd(parts: list[float]) -> float:
    """The planted fault: torch's own accumulation into a bf16 gradient."""
    net = weights().to(BF16)
    for part in parts:
        (net.matrix * part).sum().backward()
    return float(net.matrix.grad[0, 0])


def check_sum(total: Callable[[list[float]], float]) -> None:
    """1 + 256 x 2^-9 = 1.5; in bf16, whose step at 1 is 2^-7, the sum stays at 1."""
    assert total([1.0] + [2.0**-9] * 256) == 1.5


def test_gradients_of_many_packs_are_summed_in_float32() -> None:
    """Many small gradients after a large one are not lost."""
    check_sum(summed_by_master)


def test_a_bf16_sum_of_gradients_is_caught() -> None:
    """The same sum stalls at 1 in bf16."""
    assert summed_by_autograd([1.0] + [2.0**-9] * 256) == 1.0
    with pytest.raises(AssertionError):
        check_sum(summed_by_autograd)


def test_gradients_of_a_models_packs_are_the_float32_sum_of_each_packs(tiny: Any, some_examples: Any) -> None:
    """On a real bf16 model: the master's gradient is the float32 sum of the bf16 gradients of each pack, to the bit."""
    net = tiny("llama-tied")
    optimizer = MasterAdamW(net, dtype=BF16, weight_decay=0.0)
    packs = [build_pack([example], [i]) for i, example in enumerate(some_examples(4))]
    alone: list[dict[str, Tensor]] = []
    for pack in packs:
        optimizer.zero()
        pack_loss(net, pack, 7.0).share.backward()
        alone.append({name: m.grad.clone() for name, m in optimizer.masters.items()})
        assert all(torch.equal(g, g.to(BF16).float()) for g in alone[-1].values())  # each is a bf16 number
    optimizer.zero()
    for pack in packs:
        pack_loss(net, pack, 7.0).share.backward()
        assert all(p.grad is None for p in net.parameters()), "a bf16 gradient is kept beside the float32 one"
    for name, master in optimizer.masters.items():
        expected = alone[0][name] + alone[1][name] + alone[2][name] + alone[3][name]
        assert torch.equal(master.grad, expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_step_forgets_the_gradients_of_the_step_before(dtype: torch.dtype) -> None:
    """A parameter that takes part in the first step only has no gradient in the second, and is not updated."""
    net = weights()
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.1)
    (net.matrix.sum() + net.vector.sum()).backward()
    assert float(optimizer.grad_norm()) == 3.0
    optimizer.zero()
    net.matrix.sum().backward()
    assert float(optimizer.grad_norm()) == pytest.approx(6**0.5)
    before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    optimizer.update(lr=0.1)
    assert torch.equal(optimizer.masters["vector"], before["vector"])
    assert not torch.equal(optimizer.masters["matrix"], before["matrix"])


# --- small updates


def moved_by_master(lr: float, updates: int) -> tuple[float, float]:
    """(float32 master, bf16 weight) after updates with a gradient of 1, beginning at 1."""
    net = weights()
    optimizer = MasterAdamW(net, dtype=BF16, weight_decay=0.0)
    for _ in range(updates):
        optimizer.zero()
        net.matrix.sum().backward()
        optimizer.grad_norm()
        optimizer.update(lr=lr)
    assert optimizer.masters["matrix"].dtype == FP32
    assert net.matrix.dtype == BF16
    return float(optimizer.masters["matrix"][0, 0]), float(net.matrix[0, 0].detach())


def moved_by_plain_adamw(lr: float, updates: int) -> tuple[float, float]:
    """The planted fault: AdamW on the bf16 weights themselves."""
    net = weights().to(BF16)
    adamw = torch.optim.AdamW([net.matrix], lr=lr, weight_decay=0.0)
    for _ in range(updates):
        adamw.zero_grad()
        net.matrix.sum().backward()
        adamw.step()
    return (float(net.matrix[0, 0].detach()),) * 2


def check_moves(moved: Callable[[float, int], tuple[float, float]]) -> None:
    """With a constant gradient AdamW moves by lr each update: 100 updates of 1e-4 are 0.01.

    Just below 1 the step of bf16 is 2^-8 = 0.0039 and an update of 1e-4 rounds away; 0.99 rounds to 253/256.
    """
    master, weight = moved(1e-4, 100)
    assert master == pytest.approx(0.99, abs=3e-6)  # 100 roundings to float32
    assert weight == 253 / 256
    master, weight = moved(1e-6, 100)
    assert master == pytest.approx(0.9999, abs=3e-6)
    assert weight == 1.0


def test_updates_below_bf16_resolution_add_up() -> None:
    """100 updates, each too small for bf16, move the weight by their sum."""
    check_moves(moved_by_master)


def test_bf16_weights_without_masters_are_caught() -> None:
    """The same 100 updates are all lost when AdamW runs on the bf16 weights themselves."""
    assert moved_by_plain_adamw(1e-4, 100)[0] == 1.0
    with pytest.raises(AssertionError):
        check_moves(moved_by_plain_adamw)


# --- the update


def textbook_adamw(
    start: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]], lr: float, decay: float
) -> dict[str, np.ndarray]:
    """Loshchilov & Hutter 2019, algorithm 2, in float64; matrices decay, vectors do not.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + e) + decay w)
    """
    b1, b2, e = 0.9, 0.999, 1e-8
    w = {name: value.copy() for name, value in start.items()}
    m, v = ({name: np.zeros_like(value) for name, value in start.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        for name, g in gradient.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat, v_hat = m[name] / (1 - b1**t), v[name] / (1 - b2**t)
            d = decay if w[name].ndim > 1 else 0.0
            w[name] = w[name] - lr * (m_hat / (np.sqrt(v_hat) + e) + d * w[name])
    return w


def check_update(dtype: torch.dtype, make: Callable[..., Any], scale: float = 1.0) -> None:
    """Six updates with random gradients, lr 0.01, weight decay 0.3, against the textbook in float64."""
    rng = np.random.default_rng(0)
    start = {"matrix": rng.normal(size=(2, 3)), "vector": rng.normal(size=3)}
    gradients = [{name: rng.normal(size=w.shape) for name, w in start.items()} for _ in range(6)]
    # gradients that bf16 can hold, so that only the update is compared
    gradients = [{n: torch.tensor(g).to(BF16).double().numpy() for n, g in each.items()} for each in gradients]
    net = Weights(*(torch.tensor(w, dtype=FP32) for w in start.values()))
    optimizer = make(net, dtype=dtype, weight_decay=0.3)
    for gradient in gradients:
        optimizer.zero()
        sum((getattr(net, n) * torch.tensor(g, dtype=dtype)).sum() for n, g in gradient.items()).backward()
        optimizer.grad_norm()
        optimizer.update(lr=0.01, divisor=torch.tensor(1 / scale))
    scaled = [{n: scale * g for n, g in each.items()} for each in gradients]
    for name, expected in textbook_adamw(start, scaled, lr=0.01, decay=0.3).items():
        np.testing.assert_allclose(optimizer.masters[name].detach().numpy(), expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(getattr(net, name).detach(), optimizer.masters[name].detach().to(dtype))


@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_update_is_the_textbooks(dtype: torch.dtype, scale: float) -> None:
    """Bias-corrected moments, decoupled decay of matrices only, and the model holds the masters cast once."""
    check_update(dtype, MasterAdamW, scale)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_update_that_is_skipped_changes_nothing(dtype: torch.dtype) -> None:
    """Not the weights, not the moments, not the count of updates, whatever the gradients are; the next one is the first."""
    runs = []
    for poisoned in (False, True):
        net = weights()
        optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.1)
        for factor in (float("nan"), 1.0) if poisoned else (1.0,):
            optimizer.zero()
            ((net.matrix.sum() + net.vector.sum()) * factor).backward()
            skip = (~torch.isfinite(optimizer.grad_norm())).float()
            optimizer.update(lr=0.1, divisor=torch.tensor(2.0), skip=skip)
        runs.append({**optimizer.masters, **optimizer.state()})
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def with_coupled_decay(net: Any, **options: Any) -> MasterAdamW:
    """The planted fault: Adam with decay in the gradient."""
    optimizer = MasterAdamW(net, **options)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.adamw.param_groups]
    optimizer.adamw = torch.optim.Adam(groups, lr=0.0)  # type: ignore[assignment]
    return optimizer


def with_decaying_vectors(net: Any, **options: Any) -> MasterAdamW:
    """The planted fault: norms and biases decay too."""
    optimizer = MasterAdamW(net, **options)
    for group in optimizer.adamw.param_groups:
        group["weight_decay"] = 0.3
    return optimizer


class WithoutBiasCorrection(MasterAdamW):
    """The planted fault: the moments count as if many updates had been made."""

    def update(self, **options: Any) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(10_000.0)
        super().update(**options)


class WithoutCast(MasterAdamW):
    """The planted fault: the model keeps its old weights."""

    def _cast(self) -> None:
        pass


@pytest.mark.parametrize("broken", [with_coupled_decay, with_decaying_vectors, WithoutBiasCorrection, WithoutCast])
def test_another_update_is_caught(broken: Callable[..., Any]) -> None:
    """The same comparison catches coupled decay, decaying vectors, missing bias correction and a model left behind."""
    with pytest.raises(AssertionError):
        check_update(BF16, broken)
