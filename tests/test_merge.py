"""Stores joined to one, and fragments joined in one store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.data.compact import compact
from shoestring.data.manifest import LatentsColumn
from shoestring.data.merge import joined_statistics, merge
from shoestring.data.store import Store, save_manifest
from shoestring.data.units import Sums
from shoestring.data.verify import verify
from shoestring.interfaces import Identity
from shoestring.runtime import UserError
from stores import BUCKETS, make_store


def rows_of(store: Store) -> list[tuple[Any, ...]]:
    """Id, moments and captions with their embeddings of all records."""
    texts = store.texts.to_table().to_pylist()
    return [
        (row["id"], row["moments_16"], row["bucket_16"], [texts[i] for i in row["caption_source"]])
        for row in store.records.to_table().to_pylist()
    ]


def test_merged_stores_hold_the_rows_of_all(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", rows=20, unit_rows=8, buckets=BUCKETS, captions_each=2, distinct_texts=9)
    two = make_store(tmp_path / "b", rows=13, unit_rows=8, buckets=BUCKETS, first=100)
    merged = merge([one, two], str(tmp_path / "m"))
    assert rows_of(merged) == rows_of(one) + rows_of(two)
    assert merged.manifest.records == 33
    assert merged.manifest.texts == 22
    assert merged.manifest.latents[0].counts == tuple(map(sum, zip((7, 7, 6), (5, 4, 4), strict=True)))
    (source,) = merged.manifest.sources  # both are of one place
    assert (source.read, source.kept) == (33, 33)
    assert verify(merged.uri).problems == []
    assert verify(merged.uri).notes == []
    with pytest.raises(UserError, match="holds a store already"):
        merge([one, two], str(tmp_path / "m"))


def test_equal_captions_are_merged_into_one(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", rows=20)
    two = make_store(tmp_path / "b", rows=30, captions_each=1)
    with pytest.raises(
        UserError, match=r"20 ids occur more than once in .*a, .*b, e.g. 'r0000\d\d'; give the later"
    ):
        merge([one, two], str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()
    merged = merge([one, two, one], str(tmp_path / "m"), duplicates="suffix")
    assert merged.manifest.texts == 30
    ids = merged.records.to_table()["id"].to_pylist()
    assert len(set(ids)) == 70
    assert ids[20] == "r000000-2"
    assert ids[50] == "r000000-3"
    assert ids[45] == "r000025"
    assert verify(merged.uri).problems == []


def test_joined_statistics_are_those_of_all_pictures(tmp_path: Path) -> None:
    (column,) = make_store(tmp_path / "a", rows=2, buckets=BUCKETS[:2]).manifest.latents
    generator = torch.Generator().manual_seed(0)
    parts, latents = [], []
    for counts, scale in (((3, 1), 1.0), ((2, 5), 4.0)):
        mine = []
        for (height, width), count in zip(column.buckets, counts, strict=True):
            noise = torch.randn(count, 2, height // 4, width // 4, generator=generator)
            mine.append(noise * scale + torch.tensor([scale, -2.0])[:, None, None])
        parts.append(measured(column, mine).model_copy(update={"counts": counts}))
        latents += mine
    joined, expected = joined_statistics(parts), measured(column, latents)
    assert joined.counts == (5, 6)
    assert joined.mean == pytest.approx(expected.mean)
    assert joined.std == pytest.approx(expected.std)
    values = torch.cat([part.flatten() for part in latents])
    assert joined.sigma == pytest.approx(float(values.std(correction=0)), rel=1e-5)


def measured(column: LatentsColumn, latents: list[torch.Tensor]) -> LatentsColumn:
    sums = Sums(column.channels)
    for part in latents:
        sums.add(part)
    return sums.update(column)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"buckets": BUCKETS},
            "latents '16' is test at 16x16, 4 .* in the first, test at 16x16 8x24 24x8,",
        ),
        (
            {"positions": "all"},
            "embeddings 't' is .* true length, int8, 8 .* in the first, .* all positions, int8, 8 ",
        ),
        (
            {"dtype": "float16"},
            "embeddings 't' is .* int8, 8 wide in the first, .* float16, 8",
        ),
    ],
)
def test_stores_of_other_columns_are_not_merged(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    one = make_store(tmp_path / "a", rows=4)
    two = make_store(tmp_path / "b", rows=4, first=50, **other)
    with pytest.raises(UserError, match=said):
        merge([one, two], str(tmp_path / "m"))


def test_stores_of_other_codecs_are_not_merged(tmp_path: Path) -> None:
    one = make_store(tmp_path / "a", rows=4)
    two = make_store(tmp_path / "b", rows=4, first=50)
    (column,) = two.manifest.latents
    column = column.model_copy(update={"codec": Identity("autoencoder-kl", digest="abc")})
    two = save_manifest(two.uri, two.manifest.model_copy(update={"latents": (column,)}))
    with pytest.raises(UserError, match=r"is test at .* in the first, autoencoder-kl \(abc\)"):
        merge([one, two], str(tmp_path / "m"))


def test_compact_joins_fragments_and_changes_nothing_else(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=50, unit_rows=8, buckets=BUCKETS)
    store.pin("run")
    made = compact(store.uri, rows=32)
    assert made.version > store.version
    assert len(made.records.get_fragments()) < len(store.records.get_fragments())
    assert made.records.to_table().equals(store.records.to_table())
    assert made.texts.to_table().equals(store.texts.to_table())
    assert not verify(store.uri).problems
    assert compact(store.uri, rows=32).version == made.version  # nothing left to join
    made.clean()
    assert Store(store.uri, store.version).take([49], ["id"])["id"].to_pylist() == ["r000049"]
    assert not verify(store.uri).problems


def test_compact_does_not_seal_damage_in(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=50, unit_rows=8)
    file = next((tmp_path / "s" / "records" / "data").iterdir())
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"records/data/.* is missing or damaged"):
        compact(store.uri)
    assert Store(store.uri).version == store.version
