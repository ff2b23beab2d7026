"""The order in which training sees the rows of one store or of a mixture of stores, bucket by bucket.

Nothing here is a state: batch number k is computed from k, so ranks, workers, micro-batches and restarts
cannot change what a run sees. Integers are exact throughout; the only random thing is a permutation that is
evaluated at single places (:func:`shoestring.data.permutation.feistel`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from shoestring.data.permutation import GOLDEN, ODD, Ints, Words, below, feistel, mix, words_of
from shoestring.runtime import UserError, stream_seed

Number = int | float | Fraction

SHUFFLED = 64
"""Batches of different shapes change places within groups of so many."""


@dataclass(frozen=True)
class StoreRows:
    """What the order needs to know of one store."""

    key: str
    """Name or digest of the store's version: the order depends on it, not on where the store lies."""
    rows: Mapping[str, int]
    """How many rows of each bucket (a shape like ``512x256``); buckets without rows may be left out."""
    block: int = 1024
    """Rows that lie together in the store and are best read together."""
    window: int | None = None
    """The rows of so many blocks at a time are shuffled with one another: few for a remote store, so that a
    bounded cache helps. ``None`` = all of them. It is a part of the order: a run keeps it."""

    def __len__(self) -> int:
        return sum(self.rows.values())


@dataclass(frozen=True)
class Slots:
    """Which rows a batch, or a part of it, holds; all of one shape."""

    bucket: str
    store_B: Ints
    """Which of the stores, by its place in the list that the order was made of."""
    row_B: Ints
    """Which of the rows that this store has in this bucket."""
    epoch_B: Ints
    """How often the run has seen this row before (key of flips and of the choice of captions)."""
    sample_B: Ints
    """Number of the sample in the run (key of noise)."""

    def __len__(self) -> int:
        return len(self.row_B)

    def part(self, rank: int, ranks: int) -> Slots:
        """The samples of one rank, or of one micro-batch of a rank.

        Args:
            rank: 0 to ``ranks`` - 1.
            ranks: any number; sizes differ by at most one, and are 0 for some where ranks outnumber samples.

        Returns:
            A stretch of the batch; those of all ranks, one after another, are the batch.
        """
        assert 0 <= rank < ranks
        cut = slice(rank * len(self) // ranks, (rank + 1) * len(self) // ranks)
        fields = (self.store_B, self.row_B, self.epoch_B, self.sample_B)
        return Slots(self.bucket, *(field[cut] for field in fields))


class Order:
    """The endless sequence of global batches over stores: a pure function of its arguments.

    * Row numbers: the samples that a store gives to a bucket are numbered s = 0, 1, 2, ...; number s is at
      place s mod n of the permutation of epoch s // n, of its n rows there. So a store that is drawn from has
      seen, in each bucket and at all times, every row equally often up to one, and what is left over at the
      end of an epoch goes into the next batch.
    * Buckets: an epoch of the order is sum r_i n_i rows (repeats r_i, rows n_i), of which bucket b holds
      N_b = sum r_i n_ib. By the end of epoch e it has had floor((e + 1) N_b / B) batches of B, so it lacks
      less than a batch. With stores that are not weighted, any two rows of any buckets and stores thus differ
      by at most one in how often they were seen, whenever an epoch of the order ends. (In the middle of an
      epoch they may differ by two: buckets cannot all finish in the same batch.) Batches of different buckets
      come in shuffled order, mixed evenly over the epoch.
    * Mixtures: after any number of samples, each store's count in a bucket is nearer than 1.68 samples to
      its share, nearer than one sample with up to four stores, and exact whenever all shares are whole.
      So it is within one batch for batches of at least two, and with up to four stores for batches of one.
      Sample by sample stores alternate evenly, so stretches of a batch have the mixture of the whole.
    * With one bucket, sample number g does not depend on the batch size: batch k holds g = k B, ...,
      k B + B - 1. A stage that begins after ``nimg`` images with another batch size begins with batch
      ceil(nimg / B): nothing is seen again too early, and fewer than B samples are left out. With several
      buckets the formula is the same, but a bucket may then repeat or leave out samples: about a batch where
      an epoch begins, and as many as come in ``SHUFFLED`` batches in its middle.

    Args:
        stores: one or more; their order in the list does not matter.
        seed: the run's seed.
        batch: samples of a global batch.
        weights: proportion of samples from each store, relative to one another; an epoch has as many samples
            as the stores have rows.
        repeats: how often an epoch holds each store (at most one of both; neither = each row once).

    Raises:
        UserError: if a store has no rows, is named twice or has a weight that is not positive, or if one of
            several buckets does not fill one batch in an epoch.
    """

    def __init__(
        self,
        stores: Sequence[StoreRows],
        seed: int,
        batch: int,
        weights: Sequence[Number] | None = None,
        repeats: Sequence[Number] | None = None,
    ) -> None:
        assert batch >= 1
        self.batch_size = batch
        self._seed = seed
        _check_stores(stores)
        times = _repeats(stores, weights, repeats)
        labels = sorted({label for store in stores for label, rows in store.rows.items() if rows})
        self.buckets = tuple(labels)
        """Shapes that the batches have."""
        self._buckets = [_Bucket(label, stores, times, seed) for label in labels]
        for bucket in self._buckets if len(self._buckets) > 1 else ():  # one alone may repeat in a batch
            _check_bucket(bucket, batch)
        self.epoch_rows: Fraction = sum((bucket.rows for bucket in self._buckets), Fraction(0))
        """Samples of an epoch; on average over epochs, as each has whole batches."""
        # Batches of an epoch as numerator and denominator: arithmetic of fractions is slow.
        self._shares = [(bucket.rows / batch).as_integer_ratio() for bucket in self._buckets]
        self._total = (self.epoch_rows / batch).as_integer_ratio()

    def epoch(self, k: int) -> int:
        """The epoch of batch number k."""
        batches, times = self._total
        epoch = k * times // batches  # of whole epochs; each begins there or a few batches before
        while self.first_batch(epoch + 1) <= k:
            epoch += 1
        return epoch

    def first_batch(self, epoch: int) -> int:
        """How many batches come before an epoch."""
        return sum(self._batches_before(epoch))

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * batches // times for batches, times in self._shares]

    def batch(self, k: int) -> Slots:
        """Batch number k (from 0) of the run.

        Args:
            k: any number below 10**12 / batch; nothing need have been asked for before.

        Returns:
            As many samples as the batch size, all of one bucket.
        """
        bucket, number = self._find(k)
        part_B, number_B = bucket.mixture.draw(number * self.batch_size, self.batch_size)
        row_B, epoch_B = bucket.place(part_B, number_B)
        sample_B = k * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        return Slots(bucket.label, bucket.store_P[part_B], row_B, epoch_B, sample_B)

    def _find(self, k: int) -> tuple[_Bucket, int]:
        """The bucket of batch number k, and how many batches of this bucket come before."""
        if len(self._buckets) == 1:
            return self._buckets[0], k
        epoch = self.epoch(k)
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        mixture = _mixture(tuple(b - a for a, b in zip(before, after, strict=True)))
        group, place = divmod(k - sum(before), SHUFFLED)
        first = group * SHUFFLED
        size = min(SHUFFLED, sum(after) - sum(before) - first)
        bucket_Q, number_Q = mixture.draw(first, size)
        key = stream_seed(self._seed, f"order of buckets, epoch {epoch}", group)
        # Buckets are shuffled, but the batches of one bucket stay in sequence: windows stay windows.
        shuffled_Q = bucket_Q[feistel(np.arange(size), size, key)]
        chosen = int(shuffled_Q[place])
        earlier = np.count_nonzero(shuffled_Q[:place] == chosen)
        return self._buckets[chosen], before[chosen] + int(number_Q[bucket_Q == chosen].min() + earlier)


class _Bucket:
    """The rows of one shape, by store: parts P, sorted by the keys of their stores."""

    def __init__(self, label: str, stores: Sequence[StoreRows], times: list[Fraction], seed: int) -> None:
        parts = [i for i, store in enumerate(stores) if store.rows.get(label, 0)]
        parts.sort(key=lambda i: stores[i].key)
        shares = [times[i] * stores[i].rows[label] for i in parts]
        scale = math.lcm(*(share.denominator for share in shares))
        self.label = label
        self.rows: Fraction = sum(shares, Fraction(0))
        """Samples of an epoch."""
        self.mixture = _mixture(tuple(int(share * scale) for share in shares))
        self.store_P = np.array(parts, dtype=np.int64)
        self._rows_P = np.array([stores[i].rows[label] for i in parts], dtype=np.int64)
        self._block_P = np.array([stores[i].block for i in parts], dtype=np.int64)
        self._window_P = np.array([_window(stores[i], label) for i in parts], dtype=np.int64)
        seeds = [stream_seed(seed, f"order/{stores[i].key}/{label}") for i in parts]
        self._key_P = np.array(seeds, dtype=np.uint64)

    def place(self, part_N: Ints, number_N: Ints) -> tuple[Ints, Ints]:
        """The rows of sample numbers, and the epoch that each is in."""
        rows_N = self._rows_P[part_N]
        epoch_N, place_N = np.divmod(number_N, rows_N)
        key_N = mix(self._key_P[part_N] + epoch_N.astype(np.uint64) * GOLDEN)
        window_N = self._window_P[part_N]
        if not window_N.any():
            return feistel(place_N, rows_N, key_N), epoch_N
        row_N = np.empty_like(place_N)
        whole, windowed = np.flatnonzero(window_N == 0), np.flatnonzero(window_N)
        row_N[whole] = feistel(place_N[whole], rows_N[whole], key_N[whole])
        row_N[windowed] = _in_windows(
            place_N[windowed],
            rows_N[windowed],
            key_N[windowed],
            self._block_P[part_N[windowed]],
            window_N[windowed],
        )
        return row_N, epoch_N


def _window(store: StoreRows, label: str) -> int:
    """Blocks of a window; 0 where one window takes all rows, so that blocks make no difference."""
    assert store.block >= 1
    assert store.window is None or store.window >= 1
    if store.window is None or store.window * store.block >= store.rows[label]:
        return 0
    return store.window


def _in_windows(place_N: Ints, rows_N: Ints, key_N: Words, block_N: Ints, window_N: Ints) -> Ints:
    """Rows at the places of an epoch: blocks permuted, then rows permuted within each window of blocks.

    The last block may be short. It is put at a random place among the others; counting it as a whole block
    with a gap of missing rows makes place // block the block also behind it.
    """
    full_N, short_N = np.divmod(rows_N, block_N)  # at least one full block, else one window took all
    gap_N = np.where(short_N > 0, block_N - short_N, 0)
    short_at_N = below(mix(key_N + ODD), words_of(full_N + 1)).astype(np.int64)
    gap_start_N = short_at_N * block_N + short_N

    def with_gap(place_N: Ints) -> Ints:
        return place_N + np.where(place_N >= gap_start_N, gap_N, 0)

    def without_gap(start_N: Ints) -> Ints:
        return start_N - np.where(start_N > gap_start_N, gap_N, 0)

    size_N = window_N * block_N
    number_N = with_gap(place_N) // size_N
    start_N = without_gap(number_N * size_N)
    end_N = np.minimum(without_gap((number_N + 1) * size_N), rows_N)
    window_key_N = mix(key_N + words_of(number_N + 2) * ODD)
    place_N = start_N + feistel(place_N - start_N, end_N - start_N, window_key_N)
    block_at_N, inside_N = np.divmod(with_gap(place_N), block_N)
    is_short_N = (short_N > 0) & (block_at_N == short_at_N)
    behind_N = (short_N > 0) & (block_at_N > short_at_N)
    others_N = np.where(is_short_N, 0, block_at_N - behind_N)
    return np.where(is_short_N, full_N, feistel(others_N, full_N, key_N)) * block_N + inside_N


@dataclass(frozen=True)
class _Fork:
    """Samples of several members: which of them go to the left, which to the right."""

    left: _Fork | int
    right: _Fork | int
    left_weight: int
    weight: int


_Node = tuple[int, int, _Fork | int]
"""Weight, number, what it is."""


class _Mixture:
    """An endless sequence over members in given proportions, as even as can be had without a state.

    Members are the leaves of a tree. Of the first m samples of a fork with shares p and 1 - p,
    floor(m p + 1/2) go to the left. As p <= 1 this grows by 0 or 1 with m, so both sides only ever grow, and
    samples are numbered within each side. Where all shares are whole numbers, every fork is exact.

    Proof of the bound: a fork adds at most 1/2 to the error of a side, and passes on its own error times the
    side's share. So a leaf of weight w is off by at most 1/2 (1 + w / w1 + w / w2 + ...), w1, w2, ... being
    the weights of the nodes above it, without the root. In a Huffman tree they grow as the Fibonacci numbers,
    w1 >= w and w(j+1) >= wj + w(j-1): the sibling of a node is no lighter than each of the node's two
    children, which were the two lightest when they were joined. 1/2 (1/1 + 1/1 + 1/2 + 1/3 + 1/5 + ...)
    is below 1.68. With up to three leaves there is at most one node between leaf and root, hence less than
    1/2 (1 + 1); four are paired, so that this holds as well.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        assert weights
        assert min(weights) > 0
        common = math.gcd(*weights)
        nodes: list[_Node] = [(w // common, i, i) for i, w in enumerate(weights)]
        heapq.heapify(nodes)
        if len(nodes) == 4:
            lightest, light, heavy, heaviest = sorted(nodes)
            nodes = [_join(4, lightest, heaviest), _join(5, light, heavy)]
        number = 2 * len(weights)
        while len(nodes) > 1:
            heapq.heappush(nodes, _join(number, heapq.heappop(nodes), heapq.heappop(nodes)))
            number += 1
        self._root = nodes[0][2]

    def draw(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Samples ``first`` to ``first + count - 1``: the member of each, and its number in that member."""
        member_N, number_N = np.empty((2, count), dtype=np.int64)
        pending: list[tuple[_Fork | int, int, Ints]] = [(self._root, first, np.arange(count))]
        while pending:
            node, first, place_M = pending.pop()
            if isinstance(node, int):
                member_N[place_M] = node
                number_N[place_M] = first + np.arange(len(place_M))
                continue
            whole, rest = divmod(2 * first * node.left_weight + node.weight, 2 * node.weight)
            # Weights can be as large as the product of all stores' rows; Python's integers then do it.
            fits = 2 * node.weight * (count + 1) < 2**63
            step_M = np.arange(len(place_M) + 1).astype(np.int64 if fits else object)
            gone_M = (rest + step_M * (2 * node.left_weight)) // (2 * node.weight)
            is_left_M = (gone_M[1:] > gone_M[:-1]).astype(bool)
            pending.append((node.left, whole, place_M[is_left_M]))
            pending.append((node.right, first - whole, place_M[~is_left_M]))
        return member_N, number_N


def _join(number: int, a: _Node, b: _Node) -> _Node:
    """A fork with a number of its own, so that nodes of equal weight have an order."""
    weight = a[0] + b[0]
    return weight, number, _Fork(a[2], b[2], a[0], weight)


@lru_cache(maxsize=256)
def _mixture(weights: tuple[int, ...]) -> _Mixture:
    return _Mixture(weights)


def _check_stores(stores: Sequence[StoreRows]) -> None:
    if not stores:
        raise UserError("no store to train on; name at least one")
    keys = [store.key for store in stores]
    for store in stores:
        assert min(store.rows.values(), default=0) >= 0
        if not len(store):
            raise UserError(f"store {store.key} has no rows; leave it out of the mixture or prepare it again")
        if keys.count(store.key) > 1:
            raise UserError(f"store {store.key} is named twice; name it once, with a higher weight")


def _repeats(
    stores: Sequence[StoreRows], weights: Sequence[Number] | None, repeats: Sequence[Number] | None
) -> list[Fraction]:
    """How often an epoch holds each row of each store."""
    if weights is not None and repeats is not None:
        raise UserError("a mixture of stores takes either weights or repeats, found both; leave one out")
    name, values = ("weight", weights) if weights is not None else ("repeats", repeats)
    if values is None:
        return [Fraction(1)] * len(stores)
    assert len(values) == len(stores)
    exact = [_positive(name, store.key, value) for store, value in zip(stores, values, strict=True)]
    if weights is None:
        return exact
    total_rows, total = sum(map(len, stores)), sum(exact)
    return [w * total_rows / (total * len(store)) for w, store in zip(exact, stores, strict=True)]


def _positive(name: str, store: str, value: Number) -> Fraction:
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"store {store} has {name} {value}, which must be a positive number; to leave the store out, "
            "do not name it"
        )
    return Fraction(str(value))  # 0.1 is meant as 1/10, not as the nearest binary fraction


def _check_bucket(bucket: _Bucket, batch: int) -> None:
    if bucket.rows >= batch:
        return
    rows = math.floor(bucket.rows)
    lower = f"lower the batch size to at most {rows}, or " if rows else ""
    raise UserError(
        f"bucket {bucket.label} holds {float(bucket.rows):.6g} rows an epoch, fewer than one batch of "
        f"{batch}; {lower}prepare the stores again with a higher --min-bucket (shoestring data prepare), "
        "which sends pictures of rarer shapes to the nearest larger bucket"
    )


def batch_number(first_nimg: int, nimg: int, batch: int) -> int:
    """The batch of an order that a run sees; see :class:`Order` on stages with other batch sizes.

    Args:
        first_nimg: images of the run before the stage.
        nimg: images of the run before this batch.
        batch: batch size of the stage.

    Returns:
        Its number.
    """
    return -(-first_nimg // batch) + (nimg - first_nimg) // batch
