"""A pack, token by token: every prefix once, answers are targets, each predicted from the position before it on its path."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.pack import tree
from instil.pack.tree import LEAST_TRUNK, build_pack
from instil.types import Batch, Example, Pack

small = settings(max_examples=150, deadline=None, derandomize=True)


def test_a_pack_by_hand(make_example: Any) -> None:
    """Two examples: prompt 1 2 3 with answer 4 5, and prompt 6 with answer 7 8 9 whose middle token does not count."""
    pack = build_pack([make_example([1, 2, 3], [4, 5]), make_example([6], [7, 8, 9], [1, 0, 0.5])], [12, 7])
    assert pack.tokens.tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert pack.reach.tolist() == [4, 4, 4, 4, 7, 7, 7]
    assert pack.at.tolist() == [2, 3, 4, 6]
    assert pack.target.tolist() == [4, 5, 7, 9]
    assert pack.weight.tolist() == [1, 1, 1, 0.5]
    assert pack.owner.tolist() == [12, 12, 7, 7]
    assert pack.examples == (12, 7)


def test_a_packs_counts(make_example: Any) -> None:
    """Computed tokens leave out each example's last token; target tokens those of weight 0."""
    pack = build_pack([make_example([1, 2, 3], [4, 5]), make_example([6], [7, 8, 9], [1, 0, 0.5])], [0, 1])
    batch = Batch(0, 0, (pack, pack), 7.0)
    assert batch.computed_tokens == 2 * 7
    assert batch.target_tokens == 2 * 4


def test_the_kinds_of_numbers(make_example: Any) -> None:
    """32 bits everywhere, whatever the examples came in."""
    example = make_example([1, 2], [3])
    pack = build_pack([example], np.array([5]))
    for name in ("tokens", "positions", "reach", "at", "target", "owner"):
        assert getattr(pack, name).dtype == np.int32, name
    assert pack.weight.dtype == np.float32
    assert pack.examples == (5,)
    assert type(pack.examples[0]) is int


def test_an_answer_of_one_token(make_example: Any) -> None:
    """It is predicted from the last prompt token and never computed."""
    pack = build_pack([make_example([1, 2], [3])], [0])
    assert pack.tokens.tolist() == [1, 2]
    assert (pack.at.tolist(), pack.target.tolist()) == ([1], [3])


def test_an_example_without_a_prompt_is_refused(make_example: Any) -> None:
    """Nothing could predict its first answer token."""
    with pytest.raises(ValueError, match=r"x\.jsonl:1: an example without prompt"):
        build_pack([make_example([1], [2]), make_example([], [2, 3])], [0, 1])


# ── trees by hand ────────────────────────────────────────────────────────────────────────────────────────────────────


def triples(pack: Pack) -> list[tuple[int, int, float, int]]:
    """(at, target, weight, owner), sorted."""
    return sorted(zip(*(getattr(pack, f).tolist() for f in ("at", "target", "weight", "owner")), strict=True))


def test_two_answers_that_begin_alike_by_hand(make_example: Any) -> None:
    """Prompt 1 2 3; answers 4 5 6 and 4 7: the tree 1 2 3 4 (5), where 4 is learnt twice and 5 and 7 are after it."""
    pack = build_pack([make_example([1, 2, 3], [4, 7]), make_example([1, 2, 3], [4, 5, 6], [1, 2, 0.5])], [8, 9])
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4]
    assert pack.reach.tolist() == [5] * 5
    assert triples(pack) == [(2, 4, 1, 8), (2, 4, 1, 9), (3, 5, 2, 9), (3, 7, 1, 8), (4, 6, 0.5, 9)]


def test_branches_by_hand(make_example: Any) -> None:
    """Prompt 1 2; answers 3 4 5 and 6 7 8, and a conversation that goes on after the first: two branches below 2."""
    pack = build_pack(
        [make_example([1, 2], [6, 7, 8]), make_example([1, 2], [3, 4, 5]), make_example([1, 2, 3, 4, 5, 9], [9, 9])],
        [0, 1, 2],
    )
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 9, 9, 6, 7]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3]
    assert pack.reach.tolist() == [9, 9, 7, 7, 7, 7, 7, 9, 9]
    assert triples(pack) == [
        (1, 3, 1, 1), (1, 6, 1, 0), (2, 4, 1, 1), (3, 5, 1, 1), (5, 9, 1, 2), (6, 9, 1, 2), (7, 7, 1, 0), (8, 8, 1, 0),
    ]  # fmt: skip
    assert sorted(pack.examples) == [0, 1, 2]


def test_an_example_inside_a_longer_one_adds_no_token(make_example: Any) -> None:
    """What the longer one computes is all that the shorter one needs."""
    long, short = make_example([1, 2, 3, 4], [5, 6]), make_example([1, 2], [3, 4])
    pack = build_pack([long, short], [0, 1])
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5]
    assert pack.reach.tolist() == [5] * 5
    assert triples(pack) == [(1, 3, 1, 1), (2, 4, 1, 1), (3, 5, 1, 0), (4, 6, 1, 0)]


def test_an_example_twice_is_learnt_twice(make_example: Any) -> None:
    """The same tokens, and at each position as many triples as copies: together the weight of two."""
    example = make_example([1, 2], [3, 4], [1, 0.5])
    pack = build_pack([example, example], [6, 6])
    assert pack.tokens.tolist() == [1, 2, 3]
    assert triples(pack) == [(1, 3, 1, 6)] * 2 + [(2, 4, 0.5, 6)] * 2
    assert pack.examples == (6, 6)
    assert float(pack.weight.sum()) == 2 * 1.5


# ── any tree ─────────────────────────────────────────────────────────────────────────────────────────────────────────

token = st.sampled_from([1, 2, 257])  # in bytes, 1 and 257 differ above the lowest only
answers = st.lists(st.tuples(token, st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=5)
some_pairs = st.lists(st.tuples(st.lists(token, min_size=1, max_size=5), answers), min_size=1, max_size=9)


def made(pairs: list[tuple[list[int], list[tuple[int, float]]]]) -> list[Example]:
    return [
        Example(np.array(p, np.int32), np.array([t for t, _ in a], np.int32), np.array([w for _, w in a], np.float32),
                f"x.jsonl:{i}", 0)
        for i, (p, a) in enumerate(pairs)
    ]  # fmt: skip


def path_to(pack: Pack, query: int) -> tuple[int, ...]:
    """The tokens that index `query` sees, in order: those k with k <= query < reach[k]."""
    return tuple(int(pack.tokens[k]) for k in range(query + 1) if query < pack.reach[k])


def check_tree(pack: Pack, examples: list[Example], indices: list[int]) -> None:
    """Against the set of the examples' prefixes: each is one index of the pack, and sees exactly itself."""
    streams = [(*e.prompt_tokens.tolist(), *e.answer_tokens.tolist()) for e in examples]
    prefixes = {stream[: k + 1] for stream in streams for k in range(len(stream) - 1)}
    n = len(pack.tokens)
    paths = [path_to(pack, q) for q in range(n)]
    assert len(pack.positions) == len(pack.reach) == n == len(prefixes)
    assert set(paths) == prefixes
    assert [len(path) - 1 for path in paths] == pack.positions.tolist()
    for q, path in enumerate(paths):
        for k in range(n):
            assert (k <= q < pack.reach[k]) == (path[: len(paths[k])] == paths[k])
    seen: set[tuple[int, ...]] = set()
    for k, path in enumerate(paths):  # depth-first: a parent comes before it, and what is below it is one run
        assert path[:-1] in seen | {()}
        seen.add(path)
        assert {q for q in range(n) if paths[q][: len(path)] == path} == set(range(k, pack.reach[k]))
    learnt: Counter[tuple[Any, ...]] = Counter()
    for i, (example, stream) in enumerate(zip(examples, streams, strict=True)):
        p = len(example.prompt_tokens)
        for j, weight in enumerate(example.weights.tolist()):
            if weight:
                learnt[stream[: p + j], stream[p + j], weight, indices[i]] += 1
    found = Counter((paths[at], target, weight, owner) for at, target, weight, owner in triples(pack))
    assert found == learnt
    assert Counter(pack.examples) == Counter(indices)


@small
@given(some_pairs, st.booleans())
def test_a_pack_is_the_trie_of_its_examples(pairs: Any, repeated: bool) -> None:
    """Every distinct prefix once, k <= q < reach[k] just where k is on q's path, and every answer token after its own."""
    examples = made(pairs)
    indices = [3 * i for i in range(len(examples))]
    if repeated:
        examples, indices = [*examples, *examples[:2]], [*indices, *indices[:2]]
    check_tree(build_pack(examples, indices), examples, indices)


def check_cuts(pack: Pack, limit: int) -> None:
    """A pack that is too large, with a trunk worth it, is cut behind the trunk and between branches, as seldom as can be."""
    n = len(pack.tokens)
    everybody = [k for k in range(n) if pack.reach[k] == n]
    trunk = next((k for k in range(n) if k not in everybody), n)
    branches = [k for k in range(trunk, n) if pack.positions[k] == trunk]
    most = max(limit - trunk, tree.LEAST_GROUP)
    if not pack.cuts:
        assert n <= limit or trunk < LEAST_TRUNK or len(branches) < 2 or n - trunk <= most
        return
    assert n > limit
    assert pack.cuts[0] == trunk >= LEAST_TRUNK
    assert pack.cuts[-1] == n
    assert set(pack.cuts[:-1]) <= set(branches)
    ends = dict(itertools.pairwise([*branches, n]))
    for begin, end in itertools.pairwise(pack.cuts):
        assert end - begin <= most or ends[begin] == end
        assert end == n or ends[end] - begin > most


@pytest.fixture(scope="module", autouse=True)
def _small_groups() -> Iterator[None]:
    """Groups as small as the packs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "LEAST_GROUP", 8)
        yield


@small
@given(some_pairs, st.integers(0, 160), st.integers(1, 200))
def test_a_pack_that_is_too_large_is_cut_between_its_branches(pairs: Any, head: int, limit: int) -> None:
    """For any branches below 0 to 160 tokens, and any limit; where they are cut changes nothing else of the pack."""
    examples = [
        replace(e, prompt_tokens=np.concatenate([np.arange(head, dtype=np.int32), e.prompt_tokens]))
        for e in made(pairs)
    ]
    pack = build_pack(examples, range(len(examples)), limit)
    check_cuts(pack, limit)
    whole = build_pack(examples, range(len(examples)))
    assert whole.cuts == ()
    for name in ("tokens", "positions", "reach", "at", "target", "weight", "owner"):
        assert getattr(pack, name).tolist() == getattr(whole, name).tolist()


def test_cuts_by_hand(make_example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk of 130 and branches of 1, 1, 3 and 1 tokens, at most 2 at a time beside it: 130, 132, 135, 136."""
    monkeypatch.setattr(tree, "LEAST_GROUP", 1)
    head = list(range(200, 330))
    examples = [make_example([*head, k], [5] * n) for k, n in ((1, 1), (2, 1), (3, 3), (4, 1))]
    pack = build_pack(examples, range(4), 132)
    assert pack.cuts == (130, 132, 135, 136)
    check_cuts(pack, 132)
    for wrong in ((129, 132, 135, 136), (130, 131, 135, 136), (130, 132, 134, 136), (130, 132, 135)):
        with pytest.raises(AssertionError):
            check_cuts(replace(pack, cuts=wrong), 132)


def changed(name: str, index: int, by: int) -> Callable[[Pack], Pack]:
    def fault(pack: Pack) -> Pack:
        values = getattr(pack, name).copy()
        values[index] += by
        return replace(pack, **{name: values})

    return fault


def one_triple_less(pack: Pack) -> Pack:
    return replace(pack, **{f: getattr(pack, f)[:-1] for f in ("at", "target", "weight", "owner")})


@pytest.mark.parametrize("fault", [
    changed("reach", 2, 1), changed("reach", 2, -1), changed("reach", 0, -1), changed("positions", -1, -2),
    changed("at", 1, 1), changed("owner", 0, 1), changed("tokens", 4, 1), one_triple_less,
])  # fmt: skip
def test_a_broken_trie_is_caught(fault: Callable[[Pack], Pack]) -> None:
    """The same check fails for a reach too long or short, a branch that restarts, and a triple elsewhere or missing."""
    answers = ([(3, 1.0), (4, 1.0), (5, 1.0)], [(6, 1.0), (7, 1.0), (8, 1.0)])
    examples = made([([1, 2], answer) for answer in answers])
    pack = build_pack(examples, [0, 1])
    check_tree(pack, examples, [0, 1])
    with pytest.raises(AssertionError):
        check_tree(fault(pack), examples, [0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_token_is_a_target_and_no_prompt_token_is(seed: int, some_examples: Any) -> None:
    """Read back from the triples, each example's answer is complete, in order, and predicted from its own tokens."""
    examples = some_examples(6, seed=seed)
    pack = build_pack(examples, range(6))
    for i, example in enumerate(examples):
        mine = pack.owner == i
        assert pack.target[mine].tolist() == example.answer_tokens.tolist()
        assert pack.positions[pack.at[mine]].tolist() == list(
            range(len(example.prompt_tokens) - 1, example.length_tokens)
        )
        whole = (*example.prompt_tokens.tolist(), *example.answer_tokens.tolist())
        assert path_to(pack, int(pack.at[mine][-1])) == whole[:-1]
