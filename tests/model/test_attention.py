"""A pack's layout is read rightly, and what a backend cannot isolate exactly it refuses in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from instil.errors import ModelError
from instil.model.attention import BACKENDS, Layout, _through_interface, attention, dense, layout_of, loop
from instil.model.load import hidden_states
from instil.pack.tree import build_pack
from instil.types import Pack

CPU = torch.device("cpu")


def pack_of(positions: list[int], reach: list[int]) -> Pack:
    none = np.zeros(0, np.int32)
    tokens, p, r = (np.array(x, np.int32) for x in (positions, positions, reach))
    return Pack(tokens, p, r, none, none, none.astype(np.float32), none, ())


def test_documents_are_bounded_where_positions_restart() -> None:
    """Three documents of 2, 1 and 3 tokens."""
    layout = layout_of(pack_of([0, 1, 0, 0, 1, 2], [2, 2, 3, 6, 6, 6]), CPU)
    assert layout.bounds == (0, 2, 3, 6)
    assert layout.reach.tolist() == [2, 2, 3, 6, 6, 6]
    assert layout.reach.dtype == torch.int64


@pytest.mark.parametrize(
    ("positions", "reach"),
    [
        ([0, 1, 2, 2], [4, 4, 3, 4]),  # two branches after a shared prefix
        ([0, 1, 0, 1], [2, 1, 4, 4]),  # a token nobody may look at
        ([0, 1, 0, 1], [4, 4, 4, 4]),  # the second document sees the first
    ],
)
def test_a_pack_with_branches_has_no_bounds(positions: list[int], reach: list[int]) -> None:
    """Only documents that all reach their end, and not further, can be computed one by one."""
    assert layout_of(pack_of(positions, reach), CPU).bounds == ()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("backend", [loop, dense])
def test_attention_is_the_textbooks(backend: Any, groups: int) -> None:
    """softmax(scale * q k') v over k <= q < reach[k], written out query by query in float64; heads shared by groups."""
    torch.manual_seed(2)
    n, heads, bounds = 9, 4, (0, 4, 5, 9)
    reach = np.repeat(bounds[1:], np.diff(bounds))
    q, k, v = torch.randn(1, heads, n, 8), *(torch.randn(1, heads // groups, n, 8) for _ in range(2))
    found = backend(q, k, v, Layout(torch.tensor(reach), bounds), 0.4)
    assert found.shape == (1, heads, n, 8)
    for head in range(heads):
        keys, values = k[0, head // groups].double().numpy(), v[0, head // groups].double().numpy()
        for i in range(n):
            seen = [j for j in range(n) if j <= i < reach[j]]
            logits = np.array([0.4 * q[0, head, i].double().numpy() @ keys[j] for j in seen])
            p = np.exp(logits - logits.max())
            expected = (p / p.sum()) @ values[seen]
            np.testing.assert_allclose(found[0, head, i].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_loop_refuses_a_tree() -> None:
    """A pack with branches has no documents to go through."""
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="use dense"):
        loop(q, q, q, Layout(torch.tensor([4, 4, 3, 4]), ()), 1.0)


# --- through transformers' interface


def call(backend: Any = loop, *, module: nn.Module | None = None, **options: Any) -> Any:
    """As a model with documents of 2 and 5 tokens would call its attention."""
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    layout = Layout(torch.tensor([2, 2, 7, 7, 7, 7, 7]), (0, 2, 7))
    given = {"instil_layout": layout, "scaling": 0.5} | options
    return _through_interface(backend)(module or nn.Identity(), q, k, k, None, **given)


def refusal(**options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(**options)
    (line,) = caught.value.lines()
    assert line.startswith("Identity: ")
    return line


def test_the_interface_gives_tokens_before_heads() -> None:
    """[1, n, H, D], as transformers wants it, and no attention weights."""
    out, attention_weights = call()
    assert out.shape == (1, 7, 4, 8)
    assert attention_weights is None


def test_a_window_shorter_than_a_document_is_refused() -> None:
    """The line says the window and the length; pack.tokens is what to change."""
    line = refusal(sliding_window=4)
    assert "window of 4 tokens" in line
    assert "has 5" in line
    assert "set pack.tokens to at most 4" in line


def test_a_window_kept_in_the_module_is_refused_too() -> None:
    """Some models hand it over, others keep it in the layer."""
    module = nn.Identity()
    module.sliding_window = 4  # type: ignore[assignment]
    assert "window of 4 tokens" in refusal(module=module)


def test_a_window_as_long_as_the_longest_document_is_accepted() -> None:
    """It cuts nothing, although the pack of 7 is longer."""
    call(sliding_window=5)


def test_a_window_counts_the_whole_of_a_tree() -> None:
    """Where there are no bounds, the pack's length is the only safe one."""
    tree = Layout(torch.tensor([7, 7, 7, 5, 5, 7, 7]), ())
    assert "has 7" in refusal(backend=dense, instil_layout=tree, sliding_window=6)


@pytest.mark.parametrize(
    ("option", "what"), [("softcap", "attention soft-capping"), ("s_aux", "attention sinks"), ("dropout", "dropout")]
)
def test_what_cannot_be_isolated_exactly_is_refused(option: str, what: str) -> None:
    """Each by its name."""
    assert what in refusal(**{option: 0.1})


def test_a_model_that_does_not_pass_the_layout_on_is_refused() -> None:
    """Without the layout its attention would see the whole pack."""
    assert "does not hand the pack's layout" in refusal(instil_layout=None)


def test_a_model_with_a_short_window_is_refused_when_a_document_is_longer(tiny: Any, some_examples: Any) -> None:
    """Mistral with a window of 8: documents of 8 pass and equal full attention, one of 9 is refused."""
    net, unlimited = tiny("mistral", sliding_window=8), tiny("mistral", sliding_window=None)
    fits = build_pack(some_examples(lengths=[(4, 5), (6, 3)]), [0, 1])
    torch.testing.assert_close(hidden_states(net, fits), hidden_states(unlimited, fits), rtol=0, atol=0)
    with pytest.raises(ModelError, match="window of 8 tokens, and an example has 9"):
        hidden_states(net, build_pack(some_examples(lengths=[(4, 5), (7, 3)]), [0, 1]))


def test_a_model_with_capped_attention_is_refused(tiny: Any, some_examples: Any) -> None:
    """Gemma 2, by its own configuration."""
    pack = build_pack(some_examples(2), [0, 1])
    with pytest.raises(ModelError, match="attention soft-capping"):
        hidden_states(tiny("gemma2", attn_logit_softcapping=50.0), pack)


def test_a_model_in_training_with_attention_dropout_is_refused(tiny: Any, some_examples: Any) -> None:
    """Its losses could not be those of the examples alone."""
    net = tiny(attention_dropout=0.1).train()
    with pytest.raises(ModelError, match="attention dropout"):
        hidden_states(net, build_pack(some_examples(2), [0, 1]))


def test_the_interface_hands_the_scale_on(tiny: Any, some_examples: Any) -> None:
    """Without one from the model it is 1 / sqrt(D); the reference is torch's default."""
    seen: list[float] = []

    def watching(query: Any, key: Any, value: Any, layout: Layout, scale: float) -> Any:
        seen.append(scale)
        return loop(query, key, value, layout, scale)

    call(watching, scaling=0.125)
    call(watching, scaling=None)
    assert seen == [0.125, 8**-0.5]


def test_every_backend_is_registered_under_its_name() -> None:
    """transformers finds each as instil_<name>."""
    for name in BACKENDS:
        assert f"instil_{name}" in AttentionInterface().valid_keys()


def test_another_attention_lasts_only_for_a_while(tiny: Any) -> None:
    """Also when the block fails."""
    net = tiny()
    with attention(net, "sdpa"):
        assert net.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError), attention(net, "eager"):
        raise RuntimeError
    assert net.config._attn_implementation == "instil_loop"


def test_loop_on_a_models_tree_is_refused(tiny: Any, some_examples: Any) -> None:
    """A whole model meets the same refusal."""
    pack = build_pack(some_examples(2), [0, 1])
    tree = replace(pack, reach=np.full_like(pack.reach, len(pack.tokens)))
    with pytest.raises(ValueError, match="use dense"):
        hidden_states(tiny(), tree)
