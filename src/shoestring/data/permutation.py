"""Random-looking bijections and bits that are computed at single places, without a table or a state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 12
"""Of the permutation. Over 60,000 keys, 8 and 10 rounds fail a chi-square test of the 24 orders of four rows
(45 and 35, expected 23), 12 pass it (26)."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ODD = np.uint64(0xD1342543DE82EF95)


def mix(words: Words) -> Words:
    """Scatter 64 bits. Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), variant 13."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def below(words: Words, bound: Words) -> Words:
    """Random words to integers below ``bound`` (at most 2**32), without the slow remainder."""
    return ((words >> np.uint64(32)) * bound) >> np.uint64(32)


def words_of(values: int | Ints | Words) -> Words:
    """Numbers as 64-bit words, at least one."""
    return np.atleast_1d(np.asarray(values)).astype(np.uint64)


def feistel(index_N: Ints, n: int | Ints, key: int | Words) -> Ints:
    """A permutation of ``range(n)`` at some places: no table, no state.

    A number is split into the two digits of a base near sqrt(n); in turn each digit is shifted by a keyed
    hash of the other, which can be undone, so the whole is a bijection. As the digits count slightly more
    than n numbers, results that are too large are permuted again until they fit.

    Args:
        index_N: places, each in ``range(n)``.
        n: how many numbers, 1 to 2**40; one for all places or one a place.
        key: any 64 bits; chooses the permutation; one for all places or one a place.

    Returns:
        The numbers at these places.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (method 3 and
    cycle-walking).
    """
    size, keys = words_of(n), words_of(key)
    high = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    low = (size + high - np.uint64(1)) // high
    result = _rounds(index_N.astype(np.uint64), high, low, keys)
    while len(out := np.flatnonzero(result >= size)):
        part = [np.broadcast_to(words, result.shape)[out] for words in (high, low, keys)]
        result[out] = _rounds(result[out], *part)
    return result.astype(np.int64)


def _rounds(numbers: Words, high: Words, low: Words, keys: Words) -> Words:
    """The permutation of ``range(high * low)``."""
    here, there = numbers // low, numbers % low
    base, other = high, low
    for _ in range(ROUNDS):
        keys = keys + GOLDEN
        here = here + below(mix(there * ODD + keys), base)
        # Below zero wraps around to something huge, so this is the remainder by the base.
        here = np.minimum(here, here - base)
        here, there, base, other = there, here, other, base
    return here * low + there


def scatter_bits(number_N: Ints, key: int) -> Words:
    """64 random-looking bits for each number.

    Args:
        number_N: any numbers, such as those of samples.
        key: any 64 bits; other keys give independent bits.

    Returns:
        The bits.
    """
    return mix(words_of(number_N) * ODD + mix(words_of(key)))
