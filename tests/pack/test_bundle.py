"""What begins alike shares a pack, each example is trained on as often as asked, and no step is one-sided for it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.pack.bins import shuffled
from instil.pack.bundle import LEAST_DEPTH, Bundles, Node, beginnings
from instil.pack.mix import Mix, epoch_examples
from instil.pack.plan import StepPlan, computed_tokens, epoch_packs, plan_steps
from instil.pack.prefixes import Prefixes
from instil.pack.tree import LEAST_TRUNK, build_pack
from instil.types import Example

small = settings(max_examples=60, deadline=None, derandomize=True)
B = 64  # examples of a step


def example(prompt: Sequence[int], answer: Sequence[int], row: int, turn: int = 0) -> Example:
    return Example(np.array(prompt, np.int32), np.array(answer, np.int32), np.ones(len(answer), np.float32),
                   f"x.jsonl:{row}", turn)  # fmt: skip


def words(n: int, key: int) -> list[int]:
    """n tokens of their own: no two keys begin alike."""
    return [1000 + key, *np.random.default_rng(key).integers(0, 900, n - 1).tolist()] if n else []


def rows_under(headers: Sequence[int], rows: int, *, header: int = 300, own: int = 60) -> list[Example]:
    """`rows` examples for each key of `headers`, of a header of 300 tokens and about 60 of their own."""
    rng = np.random.default_rng(0)
    found = []
    for key in headers:
        for _ in range(rows):
            n, row = int(rng.integers(own // 2, 3 * own // 2)), len(found)
            found.append(example(words(header, key) + words(n // 2, 50_000 + row), words(n - n // 2, row), row))
    return found


def flat(steps: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The packs of all steps."""
    return [pack for step in steps for pack in step]


# ── every example, within the capacity ───────────────────────────────────────────────────────────────────────────────

NODES = [words(n, key) for key, n in enumerate((0, 17, 23, 40))]


@st.composite
def corpora(draw: st.DrawFn) -> list[Example]:
    """Examples below a few nested beginnings, answers to one prompt, and conversations of several turns."""
    examples: list[Example] = []
    for row in range(draw(st.integers(1, 14))):
        path = [t for node in draw(st.lists(st.sampled_from(NODES), max_size=3)) for t in node]
        prompt = [*path, *words(draw(st.integers(1, 6)), 100 + draw(st.integers(0, 5)))]
        for turn in range(draw(st.integers(1, 3))):
            answer = words(draw(st.integers(1, 9)), 200 + draw(st.integers(0, 20)))
            examples.append(example(prompt, answer, row, turn))
            prompt = [*prompt, *answer, *words(draw(st.integers(1, 9)), 300 + row)]
    return examples


def brute_trie(examples: Sequence[Example], pack: Sequence[int]) -> int:
    """The number of distinct prefixes."""
    streams = [(*examples[i].prompt_tokens.tolist(), *examples[i].answer_tokens[:-1].tolist()) for i in set(pack)]
    return len({stream[: k + 1] for stream in streams for k in range(len(stream))})


def trunk(examples: Sequence[Example], pack: Sequence[int]) -> int:
    """How many first tokens all of them have."""
    streams = [(*examples[i].prompt_tokens.tolist(), *examples[i].answer_tokens[:-1].tolist()) for i in pack]
    return next(
        (k for k, tokens in enumerate(zip(*streams, strict=False)) if len(set(tokens)) > 1), min(map(len, streams))
    )


def check_packs(
    packs: Sequence[np.ndarray], examples: Sequence[Example], prefixes: Prefixes, chosen: np.ndarray, capacity: int
) -> None:
    """Every chosen example as often as chosen; sizes counted right; above the capacity only what has a trunk, which can be
    computed in parts, and an example that is too long itself, with what adds nothing to it."""
    assert Counter(int(i) for pack in packs for i in pack) == Counter(chosen.tolist())
    sizes = computed_tokens(prefixes, packs).tolist()
    for pack, size in zip(packs, sizes, strict=True):
        assert len(pack)
        assert size == brute_trie(examples, pack.tolist())
        longest = max(examples[i].length_tokens for i in pack)
        assert size <= capacity or size == longest or trunk(examples, pack.tolist()) >= LEAST_TRUNK


@small
@given(corpora(), st.data())
def test_every_example_is_in_one_pack_as_often_as_it_is_chosen(examples: list[Example], data: st.DataObject) -> None:
    """For any conversations, repetition, capacity and batch; and a pack is as large as it was counted."""
    prefixes = Prefixes.of(examples)
    index = st.integers(0, len(examples) - 1)
    chosen = np.sort(np.array(data.draw(st.lists(index, min_size=1, max_size=30) | st.just(range(len(examples))))))
    capacity, batch = data.draw(st.integers(5, 150)), data.draw(st.floats(1, 30))
    packs = Bundles(prefixes, chosen, capacity, batch, data.draw(st.integers(0, 3)), 0).packs()
    check_packs(packs, examples, prefixes, chosen, capacity)
    for pack, size in zip(packs, computed_tokens(prefixes, packs).tolist(), strict=True):
        assert len(build_pack([examples[i] for i in pack], pack.tolist()).tokens) == size


@small
@given(corpora(), st.integers(1, 9), st.integers(1, 120), st.integers(0, 3))
def test_an_epoch_of_a_mix_holds_what_was_dealt(examples: list[Example], batch: int, limit: int, epoch: int) -> None:
    """Through plan and steps, with a source at a half and one at two and a half."""
    prefixes = Prefixes.of(examples)
    source, targets = np.arange(len(examples)) % 2, np.array([len(e.answer_tokens) for e in examples])
    dealt = [epoch_examples(targets, source, Mix(repeats=(0.5, 2.5)), 3, k) for k in (0, epoch)]
    least = min(map(len, dealt))
    if not least:
        return
    plan = plan_steps(prefixes, batch, limit, chosen=dealt[0], most_steps=least, seed=3)
    steps = epoch_packs(prefixes, plan, 3, epoch, dealt[1])
    assert len(steps) == plan.steps_per_epoch
    assert all(steps)
    check_packs(flat(steps), examples, prefixes, dealt[1], plan.capacity_tokens)


@pytest.mark.parametrize("fault", [
    lambda packs: packs[1:], lambda packs: [*packs, packs[0]],
    lambda packs: [np.concatenate([packs[0], packs[1]]), *packs[2:]],
], ids=["lost", "twice", "too-full"])  # fmt: skip
def test_a_wrong_set_of_packs_is_caught(fault: Callable[[Any], Any]) -> None:
    """The same check fails for a pack lost, trained on twice, or joined with another."""
    examples = rows_under([1, 2, 3, 4], 2)
    prefixes, chosen = Prefixes.of(examples), np.arange(8)
    packs = Bundles(prefixes, chosen, 500, 8, 0, 0).packs()
    check_packs(packs, examples, prefixes, chosen, 500)
    with pytest.raises(AssertionError):
        check_packs(fault(packs), examples, prefixes, chosen, 500)


def test_what_adds_nothing_joins_an_example_that_is_too_long() -> None:
    """A conversation of 4 turns whose last is over the capacity: the turns inside it go along, another row does not."""
    said = words(100, 7)
    turns = [example(said[: 20 * k], said[20 * k : 20 * k + 5], 1, k) for k in (1, 2, 3)]
    examples = [*turns, example(said[:90], said[90:], 1, 4), example(words(5, 1), [1], 2)]
    packs = Bundles(Prefixes.of(examples), np.arange(5), 50, 4, 0, 0).packs()
    assert sorted(sorted(pack.tolist()) for pack in packs) == [[0, 1, 2, 3], [4]]


# ── what is drawn together ───────────────────────────────────────────────────────────────────────────────────────────


def first_bundles(
    examples: Sequence[Example], chosen: np.ndarray, capacity: int, batch: float, seed: int = 0
) -> list[list[int]]:
    """The families, or parts of them, that nothing separates any more."""
    made = Bundles(Prefixes.of(examples), chosen, capacity, batch, seed, 0)
    return [chosen[made.of == b].tolist() for b in range(int(made.of.max()) + 1)]


@pytest.mark.parametrize("epoch", range(3))
def test_the_turns_of_a_conversation_are_in_one_pack(epoch: int) -> None:
    """Where they fit, at any batch size; 100 conversations of 1 to 6 turns, some begun alike."""
    rng = np.random.default_rng(1)
    examples: list[Example] = []
    for row in range(100):
        said = [*(words(40, row % 3) if row % 2 else []), *words(int(rng.integers(5, 60)), 1000 + row)]
        for turn in range(int(rng.integers(1, 7))):
            answer = words(int(rng.integers(3, 40)), 2000 + row)
            examples.append(example(said, answer, row, turn))
            said = [*said, *answer, *words(9, 3000 + turn)]
    prefixes = Prefixes.of(examples)
    for batch in (12, 40):
        plan = plan_steps(prefixes, batch, 900)
        where = {int(i): p for p, pack in enumerate(flat(epoch_packs(prefixes, plan, 0, epoch))) for i in pack}
        together = 0
        for row in range(100):
            turns = [i for i, e in enumerate(examples) if e.origin == f"x.jsonl:{row}"]
            if brute_trie(examples, turns) <= plan.capacity_tokens:
                assert len({where[i] for i in turns}) == 1
                together += len(turns) > 1
        assert together > 50, "the oracle must see conversations that fit"


@pytest.mark.parametrize(("batch", "most"), [(64, 16), (10, 2), (1, 2)])
def test_of_answers_to_one_prompt_a_quarter_of_a_step_is_drawn_together(batch: float, most: int) -> None:
    """70 answers to one prompt, 5 to another, 30 to others: in parts of at most a quarter of a step, and never alone."""
    prompts = [0] * 70 + [1] * 5 + list(range(2, 32))
    examples = [example(words(10, p), words(6, 100 + i), i) for i, p in enumerate(prompts)]
    bundles = first_bundles(examples, np.arange(105), 10_000, batch)
    sizes = Counter((prompts[bundle[0]], len(bundle)) for bundle in bundles)
    assert all(len({prompts[i] for i in bundle}) == 1 for bundle in bundles)
    assert sum(n for (p, _), n in sizes.items() if p == 0) == -(-70 // most)
    assert max(map(len, bundles)) == most
    assert sizes[1, 5] == (1 if most >= 5 else 0)


def test_answers_are_parted_by_chance() -> None:
    """Another seed brings others of the 40 answers to one prompt together."""
    examples = [example(words(10, 0), words(6, 100 + i), i) for i in range(40)]
    first, second = ({frozenset(b) for b in first_bundles(examples, np.arange(40), 10_000, B, s)} for s in (0, 1))
    assert not first & second


def test_copies_of_an_example_are_never_drawn_together() -> None:
    """Of answers and turns chosen up to three times, a family holds each at most once; none of the copies is lost."""
    answers = [example(words(10, 0), words(6, 100 + i), i) for i in range(8)]
    said = words(60, 1)
    turns = [example(said[: 10 * k], said[10 * k : 10 * k + 5], 99, k) for k in range(1, 6)]
    chosen = np.sort(np.concatenate([np.arange(13), np.arange(0, 13, 2), np.arange(0, 13, 4)]))
    bundles = first_bundles([*answers, *turns], chosen, 10_000, B)
    assert all(len(set(bundle)) == len(bundle) for bundle in bundles)
    assert Counter(i for bundle in bundles for i in bundle) == Counter(chosen.tolist())
    assert sorted(len(b) for b in bundles if b[0] >= 8) == [2, 3, 5]  # of the turns: the third copies, the second, all


# ── beginnings ───────────────────────────────────────────────────────────────────────────────────────────────────────


def spans(node: Node) -> list[tuple[int, int, int]]:
    """(begin, end, depth) of a node and all below it; what is below another is inside it, and deeper."""
    found = [(node.begin, node.end, node.depth)]
    for child in node.children:
        assert node.begin <= child.begin < child.end <= node.end
        assert child.depth > node.depth
        found += spans(child)
    return found


@small
@given(corpora(), st.integers(1, 8), st.data())
def test_beginnings_are_the_sets_of_examples_that_begin_alike(
    examples: list[Example], least: int, data: st.DataObject
) -> None:
    """A node is all examples with its first tokens, these are all that they have in common, and none is missed."""
    prefixes = Prefixes.of(examples)
    order = np.argsort(prefixes.rank)
    streams = [[*examples[i].prompt_tokens.tolist(), *examples[i].answer_tokens[:-1].tolist()] for i in order]
    used = data.draw(st.lists(st.integers(0, 3), min_size=len(streams), max_size=len(streams)))
    before = np.cumsum([0, *used])
    found = spans(beginnings(prefixes.common, before, least))
    assert found[0][:2] == (0, len(streams))
    for begin, end, depth in found:
        alike = [i for i, s in enumerate(streams) if s[:depth] == streams[begin][:depth]]
        assert alike == list(range(begin, end))
        shortest = min(len(s) for s in streams[begin:end])
        further = {tuple(s[: depth + 1]) for s in streams[begin:end]}
        assert (begin, end) == (0, len(streams)) or depth == shortest or len(further) > 1
        assert (begin, end) == (0, len(streams)) or sum(used[begin:end]) >= least
    starts = {tuple(s[:LEAST_DEPTH]) for s in streams if len(s) >= LEAST_DEPTH}
    for start in starts:
        alike = [i for i, s in enumerate(streams) if tuple(s[:LEAST_DEPTH]) == start]
        if len(alike) > 1 and sum(used[i] for i in alike) >= max(2, least):
            assert any((b, e) == (alike[0], alike[-1] + 1) for b, e, _ in found)


# ── fairness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def largest_share(steps: Sequence[Sequence[int]], schema: np.ndarray) -> float:
    """The share of a step that the schema has of which it holds most; the mean over steps."""
    return float(np.mean([max(Counter(schema[list(step)].tolist()).values()) / len(step) for step in steps]))


def company(steps: Sequence[Sequence[int]], inside: np.ndarray) -> float:
    """How many of its kind an example meets in its step, itself included; the mean over the examples `inside`."""
    counts = np.array([inside[list(step)].sum() for step in steps])
    return float((counts**2).sum() / counts.sum())


def members(steps: list[list[np.ndarray]]) -> list[list[int]]:
    return [[int(i) for pack in step for i in pack] for step in steps]


def fair(steps: Sequence[Sequence[int]], key: int) -> list[list[int]]:
    """The same examples in steps of the same sizes, dealt by chance alone."""
    held = [i for step in steps for i in step]
    order = [held[i] for i in shuffled(len(held), (key, 0)).tolist()]
    cuts = np.cumsum([0, *map(len, steps)])
    return [order[a:b] for a, b in itertools.pairwise(cuts)]


def largest_shares(prefixes: Prefixes, plan: StepPlan, schema: np.ndarray) -> tuple[float, float]:
    """Of six epochs, and of a fair draw of them."""
    epochs = [members(epoch_packs(prefixes, plan, 5, epoch)) for epoch in range(6)]
    found = np.mean([largest_share(steps, schema) for steps in epochs])
    chance = np.mean([largest_share(fair(steps, k), schema) for k, steps in enumerate(epochs)])
    return float(found), float(chance)


@pytest.fixture(scope="module")
def schemas() -> tuple[list[Example], np.ndarray, Prefixes]:
    """20 tool schemas of 300 tokens, 50 rows each."""
    examples = rows_under(range(20), 50)
    return examples, np.repeat(np.arange(20), 50), Prefixes.of(examples)


@pytest.mark.parametrize("limit", [2048, 8192])
def test_a_step_holds_no_more_of_a_schema_than_a_fair_draw(limit: int, schemas: Any) -> None:
    """On average over the steps of six epochs, the largest share of a schema is at most 1.6 times that of chance."""
    _, schema, prefixes = schemas
    found, chance = largest_shares(prefixes, plan_steps(prefixes, B, limit), schema)
    assert found <= 1.6 * chance


@pytest.mark.parametrize("limit", [2048, 8192])
def test_a_step_of_one_schema_is_caught(limit: int, schemas: Any) -> None:
    """The same bound is exceeded where four times as many of a schema may be drawn together."""
    _, schema, prefixes = schemas
    plan = replace(plan_steps(prefixes, B, limit), batch_examples=4.0 * B)
    found, chance = largest_shares(prefixes, plan, schema)
    assert found > 1.6 * chance


@pytest.mark.parametrize("limit", [2048, 8192])
def test_schemas_are_computed_once_for_several_rows(limit: int, schemas: Any) -> None:
    """Computed tokens are less than half of those without sharing: about three of a schema meet in a pack."""
    _, _, prefixes = schemas
    plan = plan_steps(prefixes, B, limit)
    for epoch in range(3):
        packs = flat(epoch_packs(prefixes, plan, 5, epoch))
        assert computed_tokens(prefixes, packs).sum() < 0.5 * prefixes.lengths.sum()


@pytest.fixture(scope="module")
def mixed() -> tuple[np.ndarray, Prefixes]:
    """One schema that half of the rows have, one that a tenth has, and rows that have nothing in common."""
    examples = [*rows_under([0], 500), *rows_under([1], 100), *rows_under(range(2, 402), 1)]
    examples = [replace(e, origin=f"x.jsonl:{i}") for i, e in enumerate(examples)]
    return np.array([0] * 500 + [1] * 100 + [2] * 400), Prefixes.of(examples)


def companies(schema: np.ndarray, prefixes: Prefixes, plan: StepPlan) -> list[float]:
    """Of four epochs: how many more of its kind an example meets than by a fair draw, for each schema."""
    epochs = [members(epoch_packs(prefixes, plan, 5, epoch)) for epoch in range(4)]
    return [
        float(
            np.mean([company(e, schema == s) for e in epochs])
            / np.mean([company(fair(e, k), schema == s) for k, e in enumerate(epochs)])
        )
        for s in range(3)
    ]


def test_a_frequent_schema_may_meet_more_often_than_a_rare_one(mixed: Any) -> None:
    """A bundle as large as what a step has on average: at most 1.5 times a fair draw for half, 2.5 for a tenth."""
    schema, prefixes = mixed
    plan = plan_steps(prefixes, B, 4096)
    half, tenth, none = companies(schema, prefixes, plan)
    assert half <= 1.5
    assert tenth <= 2.5
    assert 0.8 < none < 1.2
    half, tenth, _ = companies(schema, prefixes, replace(plan, batch_examples=16.0 * B))
    assert min(half - 1.5, tenth - 2.5) > 0, "the bound must see a rule that is broken"


def weights_of_steps(steps: Sequence[Sequence[int]], inside: np.ndarray) -> float:
    """What an example of `inside` weighs in its step, which divides by what it holds; 1 = in a step of B examples."""
    return float(np.mean([B / len(step) for step in steps for i in step if inside[i]]))


def test_what_shares_nothing_weighs_as_much_as_what_shares(mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs that share hold more examples: dealt by that number, steps are alike; dealt by chance, they are not."""
    schema, prefixes = mixed
    plan = plan_steps(prefixes, B, 4096)

    def ratio() -> float:
        steps = [step for epoch in range(4) for step in members(epoch_packs(prefixes, plan, 5, epoch))]
        return weights_of_steps(steps, schema == 2) / weights_of_steps(steps, schema == 0)

    assert ratio() <= 1.2
    monkeypatch.setattr(
        "instil.pack.plan._dealt",
        lambda counts, steps, order: [part.tolist() for part in np.array_split(order, steps)],
    )
    assert ratio() > 1.4


def test_a_source_that_is_used_less_is_drawn_together_less() -> None:
    """Fair is what the epoch holds: of a schema that half of the rows have and a mix makes a tenth, not half a step."""
    examples = [*rows_under([0], 900), *rows_under(range(1, 901), 1)]
    examples = [replace(e, origin=f"x.jsonl:{i}", source=int(i >= 900)) for i, e in enumerate(examples)]
    prefixes, source = Prefixes.of(examples), np.array([e.source for e in examples])
    targets = np.array([len(e.answer_tokens) for e in examples])
    dealt = [epoch_examples(targets, source, Mix(weights=(1.0, 9.0)), 5, k) for k in range(4)]
    plan = plan_steps(prefixes, B, 8192, chosen=dealt[0], most_steps=min(map(len, dealt)), seed=5)
    steps = [members(epoch_packs(prefixes, plan, 5, k, chosen)) for k, chosen in enumerate(dealt)]
    found = np.mean([company(epoch, source == 0) for epoch in steps])
    chance = np.mean([company(fair(epoch, k), source == 0) for k, epoch in enumerate(steps)])
    assert found <= 2 * chance


# ── one system prompt ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("system", "batch"), [(200, 64), (700, 1000)])
def test_one_system_prompt_is_computed_once_a_pack(system: int, batch: int) -> None:
    """All 3,000 examples have it: packs are 99% full, and computed tokens within 3% of the least there can be."""
    examples = rows_under([0], 3000, header=system)
    prefixes = Prefixes.of(examples)
    plan = plan_steps(prefixes, batch, 4096)
    for epoch in range(2):
        packs = flat(epoch_packs(prefixes, plan, 0, epoch))
        computed = int(computed_tokens(prefixes, packs).sum())
        assert computed >= 0.99 * len(packs) * plan.capacity_tokens
        own = int((prefixes.lengths - system).sum())
        assert computed <= 1.03 * (own + system * -(-own // (4096 - system)))
        assert plan.packs_per_epoch <= len(packs) <= 1.01 * plan.packs_per_epoch


# ── by chance, but not by accident ───────────────────────────────────────────────────────────────────────────────────


def test_packs_are_a_pure_function_of_seed_and_epoch(schemas: Any) -> None:
    """Asked again, in any order, they are the same; another seed or epoch draws others together."""
    _, _, prefixes = schemas
    plan = plan_steps(prefixes, B, 4096)

    def drawn(seed: int, epoch: int) -> list[list[list[int]]]:
        return [[pack.tolist() for pack in step] for step in epoch_packs(prefixes, plan, seed, epoch)]

    keys = [(1, 0), (1, 1), (2, 0), (1, 2)]
    found = {key: drawn(*key) for key in keys}
    assert all(drawn(*key) == found[key] for key in reversed(keys))
    pairs = [
        {frozenset(two) for step in steps for pack in step for two in itertools.pairwise(sorted(pack))}
        for steps in found.values()
    ]
    for i in range(4):
        for j in range(i):
            assert len(pairs[i] & pairs[j]) < 0.2 * len(pairs[i])
