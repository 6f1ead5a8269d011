"""Every backend is the definition, output and gradients, on random trees; planted faults in the merging are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from instil.model import kernels, layout
from instil.model.attention import Rule, best, dense, flexible, in_parts, matmul
from instil.model.kernels import FlashCPU, Matmul, Varlen
from instil.model.layout import Layout, layout_of
from instil.pack.tree import build_pack
from tries import pack_of_paths, random_paths

CPU, META = torch.device("cpu"), torch.device("meta")
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
TOLERANCE = {FP64: 1e-10, FP32: 1e-6}


# --- a slow kernel with the signature of torch's CUDA flash attention


def slow_parts(q, k, cu_q, cu_k, causal, scale, left, right):  # type: ignore[no-untyped-def]
    """(query rows, key rows, logits [H, queries, keys]) of each sequence; head h of q looks at key head h // (H / K)."""
    shared = q.shape[1] // k.shape[1]
    for i in range(len(cu_q) - 1):
        a, b, c, d = int(cu_q[i]), int(cu_q[i + 1]), int(cu_k[i]), int(cu_k[i + 1])
        logits = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(shared, 1)) * scale
        row, column = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        hidden = torch.zeros(b - a, d - c, dtype=torch.bool)
        if causal or right == 0:
            hidden |= column > row
        if left >= 0:
            hidden |= column < row - left
        yield slice(a, b), slice(c, d), logits.masked_fill(hidden, float("-inf"))


def check_call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """What the CUDA kernels insist on."""
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert k.shape[1] == v.shape[1]
    assert q.shape[1] % k.shape[1] == 0
    for x, cu, most in ((q, cu_q, max_q), (k, cu_k, max_k)):
        assert x.stride(-1) == 1
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert (int(cu[0]), int(cu[-1])) == (0, len(x))
        assert int(cu.diff().min()) > 0, "an empty sequence has no log-sum-exp"
        assert most >= int(cu.diff().max())
    assert max_q > 1, "for one query flash attention returns its log-sum-exp in another order"


def slow_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right
):  # type: ignore[no-untyped-def]
    """As aten._flash_attention_forward; lse [H, rows]."""
    check_call(q, k, v, cu_q, cu_k, max_q, max_k)
    assert (dropout, debug) == (0.0, False)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, FP32))
    for here, there, logits in slow_parts(q, k, cu_q, cu_k, causal, scale, window_size_left, window_size_right):
        values = v[there].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[here] = torch.einsum("hqk,khd->qhd", logits.softmax(-1).to(v.dtype), values)
        lse[:, here] = logits.logsumexp(-1)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def slow_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    """As aten._flash_attention_backward: from the out and lse that it is given, whatever they are of."""
    check_call(q, k, v, cu_q, cu_k, max_q, max_k)
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], len(q))
    shared = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for here, there, logits in slow_parts(q, k, cu_q, cu_k, causal, scale, window_size_left, window_size_right):
        p = (logits - lse[:, here, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", grad[here], v[there].repeat_interleave(shared, 1))
        ds = p * (dp - (grad[here] * out[here]).sum(-1).t()[..., None]) * scale
        dq[here] = torch.einsum("hqk,khd->qhd", ds, k[there].repeat_interleave(shared, 1))
        dk[there] = torch.einsum("hqk,qhd->khd", ds, q[here]).unflatten(1, (-1, shared)).sum(2)
        dv[there] = torch.einsum("hqk,qhd->khd", p, grad[here]).unflatten(1, (-1, shared)).sum(2)
    return dq, dk, dv


def varlen(query: Tensor, key: Tensor, value: Tensor, made: Layout, rule: Rule) -> Tensor:
    """The CUDA algorithm with slow kernels in place of CUDA's."""
    return in_parts(query, key, value, made, rule, Varlen(slow_forward, slow_backward))


BACKENDS = {"best": best, "matmul": matmul, "varlen": varlen}


# --- sums over the queries that share a key


@pytest.mark.parametrize("lengths", [(300,), (40, 41)], ids=["one part", "a rectangle of parts"])
def test_gradients_of_shared_keys_add_up_in_float32(
    lengths: tuple[int, ...], make_example: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32 query heads over one key head, computed in bfloat16: what they have in common is not rounded again, so that
    the sum is finer than bfloat16 (2^-9); the oracle is the definition in float64."""
    monkeypatch.setattr(kernels, "FLOAT32_PAIRS", {False: 0, True: 0})
    monkeypatch.setattr(kernels, "_shares_natively", lambda: False)
    pack = build_pack([make_example([7 + i], list(range(n))) for i, n in enumerate(lengths)], range(len(lengths)))
    made = layout_of(pack, CPU)
    (group,) = FlashCPU().groups(made, None)[0]
    n = len(pack.tokens)
    common = torch.randn(2, n, 1, 1, 8)
    q, grad = (common + torch.randn(2, n, 1, 32, 8) / 8).bfloat16()
    k, v = torch.randn(2, n, 1, 8).bfloat16()
    leaves = [x.double().requires_grad_() for x in (k, v)]
    heads = [x.permute(1, 2, 0, 3).flatten(0, 1)[None] for x in (q.double(), *(y[:, :, None] for y in leaves))]
    out = dense(*heads, made, Rule(8**-0.5))
    out.backward(grad.double().permute(1, 2, 0, 3).flatten(0, 1)[None])
    logits = (heads[0] @ heads[1].mT * 8**-0.5).detach()
    i = torch.arange(n)
    seen = (i[None] <= i[:, None]) & (i[:, None] < made.reach[None])
    lse = logits.masked_fill(~seen, float("-inf")).logsumexp(-1)[0].t()[:, None].float()
    rows = out.detach()[0].transpose(0, 1)[:, None].bfloat16()
    _, *found = FlashCPU().backward(grad, q, k, v, rows, lse, made, group, 8**-0.5)
    for x, leaf in zip(found, leaves, strict=True):
        expected = group.keys.of(leaf.grad)
        assert float((x.double() - expected).norm() / expected.norm()) < 1e-3


# --- the comparison


def inputs(n: int, shared: tuple[int, int], width: int, dtype: torch.dtype, *, sinks: bool = False) -> list[Tensor]:
    """q, k, v (and sinks), as models hand them over: tokens before heads in memory."""
    keys, group = shared
    made = [torch.randn(1, n, heads, width, dtype=dtype).transpose(1, 2) for heads in (keys * group, keys, keys)]
    return [*made, torch.randn(keys * group, dtype=dtype)] if sinks else made


def results(
    backend: Callable[..., Tensor], made: Layout, given: list[Tensor], grad: Tensor, rule: Rule
) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = backend(*leaves[:3], made, replace(rule, sinks=leaves[3] if len(leaves) > 3 else None))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; a gradient that is 0 in theory (of a softmax over one key) is measured by the others."""
    scale = 0.2 * max(float(x.double().norm()) for x in expected)
    return max(
        float((x.double() - y.double()).norm()) / max(float(y.double().norm()), scale)
        for x, y in zip(found, expected, strict=True)
    )


def check(made: Layout, rule: Rule, dtype: torch.dtype, names: tuple[str, ...], **shape: Any) -> None:
    """Each backend against the definition in float64. In few tokens float32 rounding does not average out."""
    given = inputs(len(made.reach), dtype=dtype, **shape)
    grad = torch.randn(given[0].shape, dtype=dtype)
    expected = results(dense, made, [x.double() for x in given], grad.double(), rule)
    limit = TOLERANCE[dtype] * (3 if len(made.reach) < 64 else 1)
    for name in names:
        error = difference(results(BACKENDS[name], made, given, grad, rule), expected)
        assert error < limit, f"{name} is off by {error:.1e}"


SHARED = st.sampled_from([(1, 1), (3, 1), (1, 4), (2, 3), (3, 2)])  # (heads of keys, queries that share one)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32), count=st.integers(1, 8), longest=st.sampled_from([1, 3, 20, 120]), shared=SHARED,
    width=st.sampled_from([8, 12, 16]), window=st.none() | st.integers(1, 130), cap=st.none() | st.floats(0.5, 5.0),
    sinks=st.booleans(), dtype=st.sampled_from([FP64, FP32]),
)  # fmt: skip
def test_parts_are_the_definition(
    seed: int, count: int, longest: int, shared: Any, width: int, window: Any, cap: Any, sinks: bool, dtype: Any
) -> None:
    """Random trees; windows, soft caps, sinks, shared heads; output and all gradients to 1e-10 or 1e-6."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    made = layout_of(pack_of_paths(random_paths(rng, count, longest)), CPU)
    names = ["best", "matmul"]
    if cap is None and (made.plain or made.window(window) is None):
        names.append("varlen")
    check(made, Rule(0.35, window, cap), dtype, tuple(names), shared=shared, width=width, sinks=sinks)


DEEP = [[*range(i), 1000 + i] for i in range(1, 30)]  # a branch after every token: one segment a token, 28 levels
TREES = {
    "one token": [[1]],
    "documents of one token": [[i] for i in range(9)],
    "deep": DEEP,
    "deep and wide": [[*range(i), 1000 + 10 * i + j, 3, 4] for i in range(1, 9) for j in range(3)],
    "a long prefix": [[*range(700), 1000 + i, *range(30 + i)] for i in range(3)],
    "a short prefix of everything": [[7, 1000 + i, *range(i)] for i in range(0, 90, 9)],
    "long documents": [[i] * (600 + i) for i in range(2)],
    "a document within another": [[1, 2, 3], [1, 2, 3, 4, 5], [6]],
}


@pytest.mark.parametrize("window", [None, 1, 2, 5, 64, 650])
@pytest.mark.parametrize("tree", TREES)
def test_special_trees(tree: str, window: int | None) -> None:
    """Single-token segments, many levels, segments longer than a block, windows as small as one token."""
    made = layout_of(pack_of_paths(TREES[tree]), CPU)
    names = ("best", "matmul", "varlen") if made.plain or made.window(window) is None else ("best", "matmul")
    check(made, Rule(0.3, window), FP64, names, shared=(2, 2), width=8, sinks=False)


@pytest.mark.parametrize("narrower", [8, 24])
def test_values_of_another_size(narrower: int) -> None:
    """As in models that compress their keys; zeros fill the gap."""
    made = layout_of(pack_of_paths(TREES["deep and wide"]), CPU)
    q, k, v = inputs(len(made.reach), (2, 2), 16, FP64)
    v = torch.randn(1, 2, len(made.reach), narrower, dtype=FP64)
    grad = torch.randn(*q.shape[:3], narrower, dtype=FP64)
    expected = results(dense, made, [q, k, v], grad, Rule(0.3))
    for backend in BACKENDS.values():
        assert difference(results(backend, made, [q, k, v], grad, Rule(0.3)), expected) < 1e-10


def test_gradients_are_those_of_finite_differences() -> None:
    """An oracle without any softmax of ours: torch's gradcheck, with a window and a sink."""
    made = layout_of(pack_of_paths([[1, 2, 3, 4], [1, 2, 5], [6, 7]]), CPU)
    given = [x.detach().requires_grad_() for x in inputs(len(made.reach), (1, 2), 4, FP64, sinks=True)]
    for kernel in (FlashCPU(), Matmul(1.5)):
        rule = Rule(0.7, window=3)
        assert torch.autograd.gradcheck(
            lambda q, k, v, s, kernel=kernel, rule=rule: in_parts(q, k, v, made, replace(rule, sinks=s), kernel), given
        )


@pytest.mark.parametrize(
    "paths", [[[i] * 40 for i in range(8)], [[*range(100), 200 + i, *range(60)] for i in range(4)]]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_bf16_is_as_exact_as_the_definition_in_bf16(paths: Any, sinks: bool) -> None:
    """Against float64, no further off than 1.5 times torch's own attention with a dense mask."""
    made = layout_of(pack_of_paths(paths), CPU)
    given = inputs(len(made.reach), (3, 3), 64, BF16, sinks=sinks)
    grad = torch.randn(given[0].shape).to(BF16)
    rule = Rule(0.125)
    exact = results(dense, made, [x.double() for x in given], grad.double(), rule)

    def torchs(q: Tensor, k: Tensor, v: Tensor, made: Layout, rule: Rule) -> Tensor:
        i = torch.arange(q.shape[2])
        mask = (i[None, :] <= i[:, None]) & (i[:, None] < made.reach[None, :])
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)

    theirs = results(dense if sinks else torchs, made, given, grad, rule)
    for backend in (best, matmul):
        ours = results(backend, made, given, grad, rule)
        for x, y, z in zip(ours, theirs, exact, strict=True):
            assert (x.double() - z).norm() <= 1.5 * (y.double() - z).norm()


# --- planted faults


def planted(fault: Callable[..., Any]) -> Callable[..., Tensor]:
    """The right forward, and a backward in which the kernel is given something else."""

    class Wrong(FlashCPU):
        def backward(self, grad, q, k, v, out, lse, made, group, scale):  # type: ignore[no-untyped-def, override]
            out, lse = fault(q, k, v, out, lse, made, group, scale)
            return super().backward(grad, q, k, v, out, lse, made, group, scale)

    return lambda q, k, v, made, rule: in_parts(q, k, v, made, rule, Wrong())


def own_of_each_part(q, k, v, out, lse, made, group, scale):  # type: ignore[no-untyped-def]
    """Each part's own out and lse, as if its call were differentiated by itself."""
    own_out, own_lse = FlashCPU().forward(q, k, v, made, group, scale)
    out, lse = out.clone(), lse.clone()
    group.queries.put(out, own_out)
    group.queries.put(lse, own_lse)
    return out, lse


def own_lse(q, k, v, out, lse, made, group, scale):  # type: ignore[no-untyped-def]
    return out, own_of_each_part(q, k, v, out, lse, made, group, scale)[1]


def own_out(q, k, v, out, lse, made, group, scale):  # type: ignore[no-untyped-def]
    return own_of_each_part(q, k, v, out, lse, made, group, scale)[0], lse


def error_of(backend: Callable[..., Tensor], made: Layout, rule: Rule, *, sinks: bool = False) -> float:
    given = inputs(len(made.reach), (2, 2), 16, FP64, sinks=sinks)
    grad = torch.randn(given[0].shape, dtype=FP64)
    return difference(results(backend, made, given, grad, rule), results(dense, made, given, grad, rule))


BRANCHES = [[*range(20), 100 + i, *range(9)] for i in range(3)]


@pytest.mark.parametrize("fault", [own_of_each_part, own_lse, own_out])
def test_a_backward_with_a_parts_own_sums_is_caught(fault: Any) -> None:
    """Only the merged output and log-sum-exp give the gradient."""
    made = layout_of(pack_of_paths(BRANCHES), CPU)
    assert error_of(planted(lambda *x: x[3:5]), made, Rule(0.3)) < 1e-10
    assert error_of(planted(fault), made, Rule(0.3)) > 1e-2


def test_a_reach_that_is_off_by_one_is_caught() -> None:
    """One query too many below the prefix, or one too few."""
    made = layout_of(pack_of_paths([*BRANCHES, [500, 501]]), CPU)

    def shifted(by: int) -> Callable[..., Tensor]:
        def backend(q: Tensor, k: Tensor, v: Tensor, _: Layout, rule: Rule) -> Tensor:
            root = replace(made.segments[0], reach=made.segments[0].reach + by)
            return best(q, k, v, replace(made, segments=(root, *made.segments[1:]), _made={}), rule)

        return backend

    assert error_of(shifted(0), made, Rule(0.3)) < 1e-10
    assert error_of(shifted(1), made, Rule(0.3)) > 1e-3
    assert error_of(shifted(-1), made, Rule(0.3)) > 1e-3


def test_a_window_that_is_off_by_one_is_caught() -> None:
    """Differences smaller than the window are seen, the window itself is not."""
    made = layout_of(pack_of_paths(BRANCHES), CPU)
    for wrong in (6, 8):
        backend = lambda q, k, v, m, rule, wrong=wrong: best(q, k, v, m, replace(rule, window=wrong))  # noqa: E731
        assert error_of(backend, made, Rule(0.3, window=7)) > 1e-3


def test_a_sink_that_is_forgotten_or_not_learnt_is_caught() -> None:
    """It takes weight from the values, and its own gradient is not 0."""
    made = layout_of(pack_of_paths(BRANCHES), CPU)

    def forgets(q: Tensor, k: Tensor, v: Tensor, m: Layout, rule: Rule) -> Tensor:
        assert rule.sinks is not None
        return best(q, k, v, m, replace(rule, sinks=None)) + 0 * rule.sinks.sum()

    def detached(q: Tensor, k: Tensor, v: Tensor, m: Layout, rule: Rule) -> Tensor:
        assert rule.sinks is not None
        return best(q, k, v, m, replace(rule, sinks=rule.sinks.detach())) + 0 * rule.sinks.sum()

    assert error_of(best, made, Rule(0.3), sinks=True) < 1e-10
    assert error_of(forgets, made, Rule(0.3), sinks=True) > 1e-2
    assert error_of(detached, made, Rule(0.3), sinks=True) > 1e-2


def test_a_batch_whose_filling_has_a_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of nearly one length share a call; its filling must give nothing to any gradient."""
    monkeypatch.setattr(layout, "BATCH_WASTE", 0.6)
    made = layout_of(pack_of_paths([[i] * (5 + i) for i in range(6)]), CPU)
    assert error_of(best, made, Rule(0.3)) < 1e-10
    rectangle = kernels._rectangle
    monkeypatch.setattr(kernels, "_rectangle", lambda *a, zeros=False: rectangle(*a))
    assert error_of(best, layout_of(pack_of_paths([[i] * (5 + i) for i in range(6)]), CPU), Rule(0.3)) > 1e-3


# --- kernels and their surroundings


def test_keys_shared_by_copying_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a torch whose CPU kernel wants as many heads of keys as of queries."""
    made = layout_of(pack_of_paths([[i] * 12 for i in range(6)]), CPU)
    assert kernels._shares_natively()
    monkeypatch.setattr(kernels, "_shares_natively", lambda: False)
    assert error_of(best, made, Rule(0.3)) < 1e-10


def test_a_block_of_the_plain_kernel_is_as_good_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is bounded by going through the queries block by block."""
    monkeypatch.setattr(kernels, "MATMUL_BYTES", 1)
    made = layout_of(pack_of_paths(BRANCHES), CPU)
    assert error_of(matmul, made, Rule(0.3, window=7, cap=1.5)) < 1e-10


@pytest.mark.parametrize("window", [None, 4])
def test_the_cuda_kernels_take_what_they_are_given(window: int | None) -> None:
    """torch's own shape rules for them, on its meta device: every argument has its place and type."""
    paths = BRANCHES if window is None else [[i] * 9 for i in range(3)]
    made = layout_of(pack_of_paths(paths), META)
    q, k, v = (x.to(META, BF16).requires_grad_() for x in inputs(len(made.reach), (2, 3), 20, FP32))
    out = in_parts(q, k, v, made, Rule(0.3, window), Varlen())
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", [Rule(0.3), Rule(0.3, window=7), Rule(0.3, cap=1.5), Rule(0.3, window=3, cap=0.7)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("shared", [(2, 2), (2, 3)])
def test_flexible_attention_is_the_definition(rule: Rule, sinks: bool, shared: Any) -> None:
    """Its forward; torch has no backward of it for the CPU."""
    made = layout_of(pack_of_paths([*BRANCHES, [500, 501]]), CPU)
    q, k, v, s = inputs(len(made.reach), shared, 16, FP64, sinks=True)
    rule = replace(rule, sinks=s if sinks else None)
    assert difference([flexible(q, k, v, made, rule)], [dense(q, k, v, made, rule)]) < 1e-10


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_only_what_needs_a_gradient_has_one(which: tuple[int, ...]) -> None:
    """As with adapters on some of the projections."""
    made = layout_of(pack_of_paths(BRANCHES), CPU)
    given = inputs(len(made.reach), (2, 2), 16, FP64, sinks=True)
    grad = torch.randn(given[0].shape, dtype=FP64)
    expected = results(dense, made, given, grad, Rule(0.3))
    leaves = [x.detach().requires_grad_(i in which) for i, x in enumerate(given)]
    out = best(*leaves[:3], made, Rule(0.3, sinks=leaves[3]))
    found = torch.autograd.grad(out, [leaves[i] for i in which], grad)
    assert difference(list(found), [expected[1 + i] for i in which]) < 1e-10


def test_without_gradients_there_is_no_graph() -> None:
    """Nothing is kept for a backward that will not come."""
    made = layout_of(pack_of_paths(BRANCHES), CPU)
    q, k, v = inputs(len(made.reach), (2, 2), 16, FP32)
    assert not best(q, k, v, made, Rule(0.3)).requires_grad
    with torch.no_grad():
        assert best(q.requires_grad_(), k, v, made, Rule(0.3)).grad_fn is None


def test_a_gradient_that_is_not_laid_out_in_memory() -> None:
    """A sum's gradient is one number under every index."""
    made = layout_of(pack_of_paths(BRANCHES), CPU)
    q, k, v = (x.requires_grad_() for x in inputs(len(made.reach), (2, 2), 16, FP64))
    found = torch.autograd.grad(best(q, k, v, made, Rule(0.3)).sum(), (q, k, v))
    expected = torch.autograd.grad(dense(q, k, v, made, Rule(0.3)).sum(), (q, k, v))
    assert difference(list(found), list(expected)) < 1e-10
