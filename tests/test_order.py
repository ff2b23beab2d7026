"""The order of batches over stores: permutations, mixtures, buckets, windows, ranks, mistakes."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from shoestring.data.order import SHUFFLED, Order, Slots, StoreRows, _mixture
from shoestring.data.permutation import feistel
from shoestring.runtime import UserError

SEEDS = st.integers(0, 2**32)
FIELDS = ("store_B", "row_B", "epoch_B", "sample_B")


def one(rows: int, batch: int = 1, seed: int = 0, **options: int) -> Order:
    return Order([StoreRows("store", {"64x64": rows}, **options)], seed, batch)


def listed(slots: Slots) -> list[tuple[str, int, int, int, int]]:
    return [
        (slots.bucket, *map(int, sample))
        for sample in zip(*(getattr(slots, field) for field in FIELDS), strict=True)
    ]


def run(order: Order, first: int, count: int) -> list[tuple[str, int, int, int, int]]:
    return [sample for k in range(first, first + count) for sample in listed(order.batch(k))]


@st.composite
def orders(draw: st.DrawFn, weighted: bool = True, max_stores: int = 4, max_batch: int = 12) -> Order:
    """Mixtures of small stores with several buckets, some windowed, each bucket with enough rows."""
    batch = draw(st.integers(1, max_batch))
    labels = draw(st.integers(1, 4))
    count = draw(st.integers(1, max_stores))
    stores = []
    for i in range(count):
        low = batch if i == 0 else 0
        rows = {f"b{j}": draw(st.integers(max(low, j == 0), 60)) for j in range(labels)}
        window = draw(st.sampled_from([None, 1, 2, 3]))
        stores.append(StoreRows(f"store {i}", rows, block=draw(st.integers(1, 9)), window=window))
    repeats = [draw(st.integers(1, 3)) for _ in stores] if weighted else None
    return Order(stores, draw(SEEDS), batch, repeats=repeats)


# The permutation


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_feistel_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(feistel(np.arange(n), n, key)), np.arange(n))


def test_feistel_of_very_many() -> None:
    for n in (2**40, 2**40 - 1, 10**12 + 39):
        ends = np.concatenate([np.arange(20_000), n - 1 - np.arange(20_000)])
        numbers = feistel(ends, n, 5)
        assert len(np.unique(numbers)) == len(ends)
        assert numbers.min() >= 0
        assert numbers.max() < n
        assert abs(numbers.mean() / n - 0.5) < 5 * 0.2887 / math.sqrt(len(ends))


def test_feistel_does_not_depend_on_its_neighbours() -> None:
    sizes = np.array([1, 2, 3, 50, 1000, 2**40])
    places, keys = np.array([0, 1, 2, 17, 999, 12345]), np.arange(6).astype(np.uint64)
    alone = [feistel(np.array([p]), int(n), int(k))[0] for p, n, k in zip(places, sizes, keys, strict=True)]
    assert feistel(places, sizes, keys).tolist() == alone


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_permutations_of_few_are_equally_likely(n: int) -> None:
    keys = 60_000
    drawn = feistel(np.tile(np.arange(n), keys), n, np.repeat(np.arange(keys).astype(np.uint64), n))
    counts = Counter(map(tuple, drawn.reshape(keys, n).tolist()))
    expected = keys / math.factorial(n)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == math.factorial(n)
    assert statistic < chi2.ppf(0.999, math.factorial(n) - 1)


@pytest.mark.parametrize("n", [7, 16, 37])
def test_pairs_of_places_get_all_pairs_of_rows(n: int) -> None:
    """For neighbours, and for the ends: every ordered pair of rows equally often."""
    keys = 200 * n
    drawn = feistel(np.tile(np.arange(n), keys), n, np.repeat(np.arange(keys).astype(np.uint64), n))
    drawn = drawn.reshape(keys, n)
    for first, second in ((0, 1), (n // 2, n // 2 + 1), (0, n - 1)):
        counts = np.bincount(drawn[:, first] * n + drawn[:, second], minlength=n * n)
        expected = keys / (n * (n - 1))
        apart = ~np.eye(n, dtype=bool).reshape(-1)
        assert counts[~apart].sum() == 0
        assert ((counts[apart] - expected) ** 2).sum() / expected < chi2.ppf(0.9999, n * (n - 1) - 1)


def test_speed() -> None:
    index = np.arange(2**20)
    order = one(50_000, batch=256)
    order.batch(0)
    best, batches = 0.0, math.inf
    for k in range(3):
        start = time.perf_counter()
        feistel(index, 2**20, k)
        best = max(best, len(index) / (time.perf_counter() - start))
    for k in range(50):
        start = time.perf_counter()
        order.batch(k)
        batches = min(batches, time.perf_counter() - start)
    print(f"{best / 1e6:.1f} M indices/s, {batches * 1e3:.2f} ms for a batch of 256 of 50,000")
    assert best > 2e5, "something is done row by row"
    assert batches < 0.01


# One store


@given(st.integers(1, 60), SEEDS, st.integers(0, 10**9), st.sampled_from([None, 1, 2, 5]), st.integers(1, 9))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int, window: int | None, block: int) -> None:
    order = one(n, seed=seed, window=window, block=block)
    samples = run(order, epoch * n, n)
    assert sorted(row for _, _, row, _, _ in samples) == list(range(n))
    assert {seen for *_, seen, _ in samples} == {epoch}
    assert order.epoch(epoch * n) == epoch
    assert order.first_batch(epoch) == epoch * n


@pytest.mark.parametrize("window", [None, 2])
def test_epochs_seeds_and_stores_differ(window: int | None) -> None:
    found = set()
    for key in ("one", "two"):
        for seed in (0, 1):
            order = Order([StoreRows(key, {"64x64": 40}, 4, window)], seed, 40)
            found |= {tuple(order.batch(epoch).row_B.tolist()) for epoch in range(3)}
    assert len(found) == 12


@given(st.integers(1, 20), st.integers(0, 300), SEEDS)
def test_the_batch_size_does_not_change_the_samples_of_one_bucket(batch: int, nimg: int, seed: int) -> None:
    """A stage with another batch size goes on where the one before it stopped, up to one of its batches."""
    stores = [StoreRows("a", {"b": 23}), StoreRows("b", {"b": 11}, block=3, window=2)]
    singles = run(Order(stores, seed, 1, weights=[0.3, 0.7]), nimg, 60)
    first = math.ceil(nimg / batch)
    skipped = first * batch - nimg
    assert skipped < batch
    assert run(Order(stores, seed, batch, weights=[0.3, 0.7]), first, 2) == singles[skipped:][: 2 * batch]


@given(st.integers(30, 400), st.integers(1, 12), st.integers(1, 4), SEEDS)
def test_windows_stay_local(n: int, block: int, window: int, seed: int) -> None:
    """At any place rows come from ``window`` blocks; a block that was left does not come again."""
    rows = one(n, n, seed, block=block, window=window).batch(0).row_B.tolist()
    blocks = [row // block for row in rows]
    last = {block: place for place, block in enumerate(blocks)}
    started = {block: blocks.index(block) for block in last}
    assert max(last[b] - started[b] for b in last) < block * window
    open_at = [sum(started[b] <= place <= last[b] for b in last) for place in range(n)]
    assert max(open_at) <= window


def test_windows_shuffle_rows_and_blocks() -> None:
    n, block, window = 1003, 10, 4
    where = np.empty((40, n))
    for seed in range(40):
        where[seed, one(n, n, seed, block=block, window=window).batch(0).row_B] = np.arange(n)
    # Also the rows of the short block come at any time.
    spread = where.mean(axis=0) - (n - 1) / 2
    assert np.abs(spread).max() < 6 * n * 0.2887 / math.sqrt(40)
    assert (np.diff(where[0, :10]) > 0).any()
    assert (np.diff(where[0, :10]) < 0).any()


# Buckets


@settings(max_examples=30)
@given(orders(weighted=False), st.integers(1, 4))
def test_views_differ_by_at_most_one_when_an_epoch_ends(order: Order, epochs: int) -> None:
    views: Counter[tuple[str, int, int]] = Counter()
    for sample in run(order, 0, order.first_batch(epochs)):
        views[sample[:3]] += 1
    seen = list(views.values()) + [0] * (int(order.epoch_rows) - len(views))
    assert len(seen) == order.epoch_rows
    assert max(seen) - min(seen) <= 1
    assert max(seen) <= epochs


@given(orders(), st.integers(1, 60))
def test_epoch_is_how_often_a_row_was_seen_before(order: Order, batches: int) -> None:
    views: Counter[tuple[str, int, int]] = Counter()
    for number, (bucket, store, row, epoch, sample) in enumerate(run(order, 0, batches)):
        assert epoch == views[bucket, store, row]
        assert sample == number
        views[bucket, store, row] += 1


@given(st.lists(st.integers(8, 60), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 10**6), SEEDS)
def test_remainders_carry_over(sizes: list[int], batch: int, epoch: int, seed: int) -> None:
    """Batches of an epoch are those that its rows fill, with what was left over before."""
    order = Order([StoreRows("a", {f"b{i}": rows for i, rows in enumerate(sizes)}, 4, 2)], seed, batch)
    found = Counter(order._find(k)[0].label for k in range(*map(order.first_batch, (epoch, epoch + 1))))
    for i, rows in enumerate(sizes):
        assert found[f"b{i}"] == (epoch + 1) * rows // batch - epoch * rows // batch


def test_buckets_are_mixed_over_the_epoch() -> None:
    order = Order([StoreRows("a", {"wide": 1800, "tall": 600, "square": 3600})], 0, 2)
    labels = [order._find(k)[0].label for k in range(order.first_batch(1))]
    for start in range(0, len(labels) - SHUFFLED, SHUFFLED):
        counts = Counter(labels[start : start + SHUFFLED])
        for label, share in (("wide", 0.3), ("tall", 0.1), ("square", 0.6)):
            assert abs(counts[label] - SHUFFLED * share) < 2 * 1.68
    assert Counter(labels) == {"wide": 900, "tall": 300, "square": 1800}
    # Not a rigid pattern: which follows which varies as in a shuffle.
    repeats = sum(a == b for a, b in pairwise(labels)) / len(labels)
    assert abs(repeats - (0.09 + 0.01 + 0.36)) < 0.05


# Mixtures


@given(st.lists(st.integers(1, 10**4), min_size=1, max_size=20), st.integers(0, 10**12), st.integers(1, 4000))
@example(weights=[462, 1, 328, 327], first=0, count=4000)
def test_counts_of_a_mixture_keep_to_its_weights(weights: list[int], first: int, count: int) -> None:
    """Within one batch: of two samples or more, and with up to four stores of one."""
    total = sum(weights)
    limit = 1 if len(weights) <= 4 else 1.68
    drawn_N = np.arange(first + 1, first + count + 1)
    member_N, number_N = _mixture(tuple(weights)).draw(first, count)
    for i, weight in enumerate(weights):
        mine = number_N[member_N == i]
        if len(mine) == 0:
            assert count * weight < 2 * limit * total
            continue
        assert np.array_equal(mine, mine[0] + np.arange(len(mine)))
        count_N = mine[0] + np.cumsum(member_N == i)
        assert np.abs(count_N * total - drawn_N * weight).max() < limit * total


@given(st.lists(st.integers(1, 10**12), min_size=2, max_size=20), st.integers(0, 10**12))
def test_a_mixture_is_the_same_from_wherever_it_is_drawn(weights: list[int], first: int) -> None:
    mixture = _mixture(tuple(weights))
    members, numbers = mixture.draw(first, 60)
    for start, count in ((0, 1), (17, 30), (59, 1)):
        part = mixture.draw(first + start, count)
        assert np.array_equal(part[0], members[start : start + count])
        assert np.array_equal(part[1], numbers[start : start + count])


def test_weights_that_need_large_integers() -> None:
    primes = [999_983, 999_979, 999_961, 999_959, 999_953]
    stores = [StoreRows(f"{n}", {"b": n, "c": 1000 + i}) for i, n in enumerate(primes)]
    order = Order(stores, 0, 100, weights=[0.1, 0.2, 0.3, 0.35, 0.05])
    counts: Counter[int] = Counter()
    batches = 600
    for k in range(batches):
        counts.update(order.batch(k).store_B.tolist())
    for i, share in enumerate((0.1, 0.2, 0.3, 0.35, 0.05)):
        assert abs(counts[i] - batches * 100 * share) < 100


@given(
    st.lists(st.tuples(st.integers(20, 500), st.floats(0.01, 10)), min_size=1, max_size=6),
    st.integers(2, 20),
)
def test_proportions(drawn: list[tuple[int, float]], batch: int) -> None:
    stores = [StoreRows(f"store {i}", {"b": rows}) for i, (rows, _) in enumerate(drawn)]
    weights = [weight for _, weight in drawn]
    order = Order(stores, 1, batch, weights=weights)
    assert order.epoch_rows == sum(rows for rows, _ in drawn)
    counts = np.zeros(len(stores))
    for k in range(60):
        counts += np.bincount(order.batch(k).store_B, minlength=len(stores))
        expected = (k + 1) * batch * np.array(weights) / sum(weights)
        assert np.abs(counts - expected).max() < batch


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(6, 25), st.integers(0, 25), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 2),
)
def test_repeats_are_views_per_epoch(drawn: list[tuple[int, int, int]], batch: int, epochs: int) -> None:
    drawn.append((5, 5, 2))
    stores = [StoreRows(f"store {i}", {"b": b, "c": c}) for i, (b, c, _) in enumerate(drawn)]
    order = Order(stores, 2, batch, repeats=[repeats for *_, repeats in drawn])
    views: Counter[tuple[str, int, int]] = Counter()
    for sample in run(order, 0, order.first_batch(epochs)):
        views[sample[:3]] += 1
    for label in order.buckets:
        total = sum(store.rows[label] * repeats for store, (*_, repeats) in zip(stores, drawn, strict=True))
        for i, (store, (*_, repeats)) in enumerate(zip(stores, drawn, strict=True)):
            rows = store.rows[label]
            seen = [views[label, i, row] for row in range(rows)]
            assert max(seen, default=0) <= epochs * repeats
            # The bucket lacks less than a batch: the store its share of that, and less than 1.68 samples.
            missing = epochs * repeats * rows - sum(seen)
            assert missing < batch * repeats * rows / total + 1.68


def test_the_order_of_the_list_does_not_matter() -> None:
    stores = [StoreRows(name, {"b": 20 + 7 * i, "c": 30}) for i, name in enumerate("xyz")]
    there = Order(stores, 4, 5, repeats=[1, 1, 0.5])
    back = Order(stores[::-1], 4, 5, repeats=[0.5, 1, 1])
    for k in range(50):
        for a, b in zip(listed(there.batch(k)), listed(back.batch(k)), strict=True):
            assert (a[0], 2 - a[1], *a[2:]) == b


# Ranks and resuming


@given(orders(), st.integers(0, 10**9), st.sampled_from([1, 2, 3, 8]), st.integers(1, 3))
def test_any_number_of_ranks_sees_the_same_batch(order: Order, k: int, ranks: int, micro: int) -> None:
    whole = order.batch(k)
    parts = [whole.part(rank, ranks) for rank in range(ranks)]
    assert [sample for part in parts for sample in listed(part)] == listed(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    steps = [part.part(i, micro) for part in parts for i in range(micro)]
    assert [sample for part in steps for sample in listed(part)] == listed(whole)


@settings(max_examples=20)
@given(orders(), st.integers(0, 39), st.sampled_from([1, 2, 3, 8]))
def test_resuming_gives_the_uninterrupted_order(order: Order, stop: int, ranks: int) -> None:
    uninterrupted = run(order, 0, 40)
    parts = [slots.part(rank, ranks) for slots in map(order.batch, range(stop, 40)) for rank in range(ranks)]
    assert [sample for part in parts for sample in listed(part)] == uninterrupted[stop * order.batch_size :]


@given(orders(), st.integers(0, 10**10))
def test_epochs_begin_where_they_say(order: Order, k: int) -> None:
    epoch = order.epoch(k)
    assert order.first_batch(epoch) <= k < order.first_batch(epoch + 1)


KNOWN_PERMUTATION = [6, 0, 2, 1, 5, 4, 8, 9, 7, 3]
KNOWN_BATCHES = [
    [("64x64", 0, 8, 0, 0), ("64x64", 1, 1, 0, 1), ("64x64", 2, 2, 0, 2), ("64x64", 1, 2, 0, 3)],
    [("64x64", 0, 2, 0, 4), ("64x64", 2, 1, 0, 5), ("64x64", 1, 6, 0, 6), ("64x64", 0, 7, 0, 7)],
    [("64x64", 0, 6, 0, 8), ("64x64", 1, 4, 0, 9), ("64x64", 2, 4, 0, 10), ("64x64", 1, 3, 0, 11)],
    [
        ("32x128", 0, 2, 95238095, 4000000000),
        ("32x128", 0, 8, 95238095, 4000000001),
        ("32x128", 0, 7, 95238095, 4000000002),
        ("32x128", 0, 6, 95238095, 4000000003),
    ],
]


def test_the_order_of_this_release() -> None:
    """Runs go on after an update only if these never change."""
    assert feistel(np.arange(10), 10, 0).tolist() == KNOWN_PERMUTATION
    stores = [
        StoreRows("a", {"64x64": 12, "32x128": 9}, block=3, window=2),
        StoreRows("b", {"64x64": 7}),
        StoreRows("c", {"64x64": 5}),
    ]
    order = Order(stores, 7, 4, weights=[0.5, 0.3, 0.2])
    assert [listed(order.batch(k)) for k in (0, 1, 2, 10**9)] == KNOWN_BATCHES


# Mistakes


@pytest.mark.parametrize("weight", [0, -1, 0.0, math.nan, math.inf])
def test_weights_are_positive(weight: float) -> None:
    stores = [StoreRows("cats", {"b": 9}), StoreRows("dogs", {"b": 9})]
    with pytest.raises(UserError, match=r"store dogs has weight .*positive"):
        Order(stores, 0, 2, weights=[1, weight])
    with pytest.raises(UserError, match=r"store dogs has repeats .*positive"):
        Order(stores, 0, 2, repeats=[1, weight])


def test_mistakes_are_named() -> None:
    cats, dogs = StoreRows("cats", {"b": 9}), StoreRows("dogs", {"b": 9})
    with pytest.raises(UserError, match="no store"):
        Order([], 0, 2)
    with pytest.raises(UserError, match="store none has no rows"):
        Order([cats, StoreRows("none", {"b": 0})], 0, 2)
    with pytest.raises(UserError, match="store cats is named twice"):
        Order([cats, dogs, cats], 0, 2)
    with pytest.raises(UserError, match="either weights or repeats"):
        Order([cats, dogs], 0, 2, weights=[1, 1], repeats=[1, 1])


def test_a_bucket_must_fill_a_batch() -> None:
    store = StoreRows("cats", {"256x256": 900, "512x256": 37})
    with pytest.raises(
        UserError, match=r"bucket 512x256 holds 37 rows an epoch.*64.*at most 37.*--min-bucket"
    ):
        Order([store], 0, 64)
    assert Order([store], 0, 37).buckets == ("256x256", "512x256")
    assert Order([store], 0, 64, repeats=[2]).buckets == ("256x256", "512x256")
    rare = StoreRows("dogs", {"256x256": 10**6, "8x8": 1})
    with pytest.raises(UserError, match=r"bucket 8x8 holds 0\.001 rows an epoch, .*; prepare"):
        Order([rare], 0, 2, repeats=[0.001])
