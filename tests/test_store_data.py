"""Stores as training data: what a batch holds, mixtures, buckets, resume, remote blocks, memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.data.cache import BlockCache
from shoestring.data.embeddings import unpack
from shoestring.data.members import Member, choose_rows
from shoestring.data.prefetch import Prefetcher
from shoestring.data.store import Store
from shoestring.data.store_rows import Mixing, StoreData
from shoestring.encoders.image import PixelCodec
from shoestring.runtime import UserError
from stores import BUCKETS, make_store, moments_of


def member_of(store: Store, held_out: float = 0.0, cache: BlockCache | None = None) -> Member:
    latents, captions = store.latents("16"), (store.captions("source"),)
    rows, _ = choose_rows(store, latents, captions, held_out, "captions")
    return Member(store, latents, store.text("t"), captions, rows, cache)


def data_of(*members: Member, **mixing) -> StoreData:
    return StoreData(members, PixelCodec(), Mixing(**mixing))


def seen(data: StoreData, batches: int, count: int = 8, first: int = 0) -> list[list[int]]:
    """Row numbers (from ``first`` in each store) by batch, read off the moments."""
    got = [
        data.batch(0, k * count, count).moments_BMhw[:, 0, 0, 0].int().tolist() for k in range(first, batches)
    ]
    data.close()
    return got


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_a_batch_holds_moments_and_captions_of_the_same_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=50, captions_each=2)
    data = data_of(member_of(store), seed=3)
    batch = data.batch(0, 0, 20)
    expected, mask = unpack(store.text("t"), store.texts.to_table())
    second = 0
    for moments, text_SD, mask_S in zip(batch.moments_BMhw, batch.text_BSD, batch.text_mask_BS, strict=True):
        row = int(moments[0, 0, 0])
        assert np.array_equal(moments.numpy(), moments_of(row, (4, 4, 4)))
        both = [expected[t, : text_SD.shape[0]] for t in (2 * row, 2 * row + 1)]
        which = [np.array_equal(text_SD.numpy(), text[: len(text_SD)]) for text in both]
        assert sum(which) == 1
        second += which[1]
        assert mask_S.sum() == mask[2 * row + which.index(True)].sum()
    data.close()
    assert 2 < second < 18  # one of several captions is drawn


def test_captions_are_drawn_anew_in_every_epoch(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=16, captions_each=5)
    data = data_of(member_of(store))
    lengths = []
    for epoch in range(12):
        batch = data.batch(0, epoch * 16, 16)
        place = batch.moments_BMhw[:, 0, 0, 0].int().tolist().index(7)
        lengths.append(int(batch.text_mask_BS[place].sum()))
    data.close()
    assert len(set(lengths)) > 2


def test_a_record_without_caption_gets_the_empty_condition(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=9, captions_each=0)
    batch = data_of(member_of(store)).some(9)
    assert not batch.text_BSD.any()
    assert batch.text_mask_BS.sum(1).tolist() == [1] * 9


def test_every_epoch_shows_every_row_once_and_resume_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=48)
    whole = seen(data_of(member_of(store), seed=1), 12)
    assert sorted(flat(whole[:6])) == sorted(flat(whole[6:])) == list(range(48))
    assert seen(data_of(member_of(store), seed=1), 12, first=5) == whole[5:]
    assert seen(data_of(member_of(store), seed=2), 12) != whole


def test_the_order_is_that_of_the_contents_not_of_the_place(tmp_path: Path) -> None:
    here, there = (make_store(tmp_path / name, rows=30) for name in ("a", "b"))
    assert seen(data_of(member_of(here)), 6) == seen(data_of(member_of(there)), 6)


def test_buckets_never_mix_in_a_batch(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=60, buckets=BUCKETS)
    data = data_of(member_of(store))
    shapes = set()
    for k in range(30):
        batch = data.batch(0, 5 * k, 5)
        shapes.add(tuple(batch.moments_BMhw.shape[1:]))
        buckets = {int(row) % 3 for row in batch.moments_BMhw[:, 0, 0, 0]}
        assert len(buckets) == 1
    data.close()
    assert shapes == {(4, 4, 4), (4, 6, 2), (4, 2, 6)}


def test_a_mixture_follows_its_weights(tmp_path: Path) -> None:
    a = make_store(tmp_path / "a", rows=30)
    b = make_store(tmp_path / "b", rows=40, first=100)
    rows = flat(seen(data_of(member_of(a), member_of(b), weights=(3.0, 1.0)), 20))
    assert abs(sum(row < 100 for row in rows) - 120) <= 2
    repeats = flat(seen(data_of(member_of(a), member_of(b), weights=(2.0, 1.0), repeats=True), 25))
    assert abs(sum(row < 100 for row in repeats) - 120) <= 2


@pytest.mark.parametrize(("weights", "message"), [((0.0, 1.0), "weight"), ((-1.0, 1.0), "weight")])
def test_a_weight_must_be_positive(tmp_path: Path, weights: tuple[float, ...], message: str) -> None:
    a, b = make_store(tmp_path / "a"), make_store(tmp_path / "b", first=100)
    with pytest.raises(UserError, match=message):
        data_of(member_of(a), member_of(b), weights=weights).order(4)


def test_a_bucket_smaller_than_a_batch_is_said_before_training(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=9, buckets=BUCKETS)
    with pytest.raises(UserError, match=r"16x16|24x8|8x24"):
        data_of(member_of(store)).order(4)
    small = make_store(tmp_path / "one", rows=3)
    assert len(data_of(member_of(small)).batch(0, 0, 8).moments_BMhw) == 8  # squares may repeat in a batch


def test_held_out_captions_are_never_trained(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=60, distinct_texts=20)
    latents, captions = store.latents("16"), (store.captions("source"),)
    train, held = choose_rows(store, latents, captions, 0.3, "captions")
    assert len(train[0]) + len(held[0]) == 60
    assert len(held[0]) > 0
    assert not {row % 20 for row in train[0]} & {row % 20 for row in held[0]}
    by_picture = choose_rows(store, latents, captions, 0.3, "pictures")
    assert {row % 20 for row in by_picture[0][0]} & {row % 20 for row in by_picture[1][0]}


def test_blocks_are_cached_and_dropped_oldest_first(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=64, unit_rows=64)
    plain = seen(data_of(member_of(store), window=2), 16)
    size = 8 * 4 * 16 * 2
    cache = BlockCache(tmp_path / "cache", limit_bytes=6 * size, block=8)
    cached = seen(data_of(member_of(store, cache=cache), window=2), 16)
    assert cached == plain
    files = list((tmp_path / "cache").glob("*.arrow"))
    assert (
        0 < sum(file.stat().st_size for file in files) <= max(6 * size, max(f.stat().st_size for f in files))
    )
    assert cache.fetched >= 16  # each block of records and of texts at least once
    again = BlockCache(tmp_path / "all", limit_bytes=10**9, block=8)
    assert seen(data_of(member_of(store, cache=again), window=2), 16) == plain
    assert again.fetched == 16


def test_a_cut_block_of_the_cache_is_fetched_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=16)
    cache = BlockCache(tmp_path / "cache", limit_bytes=10**9, block=8)
    plain = seen(data_of(member_of(store, cache=cache)), 4)
    for file in (tmp_path / "cache").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    assert seen(data_of(member_of(store, cache=BlockCache(tmp_path / "cache", 10**9, block=8))), 4) == plain


def test_pixels_are_mirrored_by_number(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=64)
    latents = store.latents("16").model_copy(update={"downsampling": 4, "mirrored": False})
    assert not latents.mirrored
    data = data_of(member_of(store), flip=True, seed=5)
    twice = [data.batch(0, 0, 64).moments_BMhw for _ in range(2)]
    data.close()
    assert torch.equal(*twice)


def test_the_prefetcher_makes_each_batch_once_and_passes_errors_on() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        if key == 7:
            raise UserError("seven")
        return key * key

    prefetcher = Prefetcher(make, lambda key: key + 1)
    assert [prefetcher.get(key) for key in range(7)] == [key * key for key in range(7)]
    with pytest.raises(UserError, match="seven"):
        prefetcher.get(7)
    prefetcher.close()
    assert sorted(made)[:8] == list(range(8))


EPOCHS = """
import os, sys
from pathlib import Path
from stores import BUCKETS, make_store
from test_store_data import data_of, member_of

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

data = data_of(member_of(make_store(Path(sys.argv[1]), rows=600, unit_rows=128, buckets=BUCKETS)))
for k in range(50 * 37):
    data.batch(0, 16 * k, 16)
    if k == 2 * 37:
        early = resident_mb()
print(resident_mb() - early)
data.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to see its memory")
def test_memory_does_not_grow_over_epochs_of_buckets(tmp_path: Path) -> None:
    words = [sys.executable, "-c", EPOCHS, str(tmp_path / "s")]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 50


def test_embeddings_that_do_not_fit_their_tokens_are_a_sentence(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=9)
    member = member_of(store)
    wider = replace(member, text=store.text("t").model_copy(update={"width": 5}))
    with pytest.raises(UserError, match=r"embeddings t are no whole number of 5 values.*data verify"):
        data_of(wider).some(9)


def test_blocks_of_another_store_at_the_same_address_are_not_taken(tmp_path: Path) -> None:
    for first in (0, 100):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        store = make_store(tmp_path / "s", rows=16, first=first)
        cache = BlockCache(tmp_path / "cache", limit_bytes=10**9, block=8)
        assert sorted(flat(seen(data_of(member_of(store, cache=cache)), 2))) == list(range(first, first + 16))


def test_parts_of_a_mixture_equal_those_of_each_store(tmp_path: Path) -> None:
    """Captions of other lengths, one store with several captions; each row as its store gives it."""
    a = member_of(make_store(tmp_path / "a", rows=11, positions="all", dtype="float16"))
    b = member_of(make_store(tmp_path / "b", rows=7, first=100, captions_each=2))
    data = data_of(a, b)
    both = data.some(18)
    for member, part in ((a, slice(0, 11)), (b, slice(11, 18))):
        alone = data_of(member).some(11)
        length = alone.text_mask_BS.shape[1]
        assert torch.equal(both.moments_BMhw[part], alone.moments_BMhw)
        assert torch.equal(both.text_BSD[part, :length], alone.text_BSD)
        assert torch.equal(both.text_mask_BS[part, :length], alone.text_mask_BS)
        assert not both.text_mask_BS[part, length:].any()
    assert data.captions == (
        *(f"caption {i}" for i in range(11)),
        *(f"caption {100 + 2 * i}" for i in range(7)),
    )


def test_pictures_to_compare_with_are_a_sample_that_is_always_the_same(tmp_path: Path) -> None:
    class Coarse(PixelCodec):  # four channels, four pixels a latent
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return super().decode(latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3))

    data = replace(data_of(member_of(make_store(tmp_path / "s", rows=50))), codec=Coarse())
    whole, some, again = data.pictures(1000), data.pictures(10), data.pictures(10)
    assert torch.equal(some.images, again.images)
    assert some.captions == again.captions
    places = [next(i for i, one in enumerate(whole.images) if torch.equal(one, each)) for each in some.images]
    assert len(places) == 10
    assert places == sorted(set(places))
    assert places[-1] > 15  # not the first ones
    assert some.captions == tuple(whole.captions[i] for i in places)
