"""Stores: tables, manifest, versions, embeddings on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.data.embeddings import pack, unpack
from shoestring.data.journal import Journal
from shoestring.data.manifest import TextColumn
from shoestring.data.store import Store
from shoestring.interfaces import Identity
from shoestring.runtime import UserError
from stores import BUCKETS, make_store, moments_of


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=40, buckets=BUCKETS)
    column = store.latents("16")
    rows = store.take([33, 2, 2, 17], ["id", column.column, column.bucket_column])
    assert rows["id"].to_pylist() == ["r000033", "r000002", "r000002", "r000017"]
    for i, data, bucket in zip((33, 2, 2, 17), rows[column.column], rows[column.bucket_column], strict=True):
        shape = column.shape(bucket.as_py())
        assert np.array_equal(np.frombuffer(data.as_py(), np.float16).reshape(shape), moments_of(i, shape))


def test_a_version_stays_when_the_store_goes_on_and_is_cleaned(tmp_path: Path) -> None:
    from shoestring.data.store import save_manifest

    store = make_store(tmp_path / "s")
    store.pin("run-1")
    newer = save_manifest(store.uri, store.manifest.model_copy(update={"made_by": "later"}))
    newest = save_manifest(store.uri, store.manifest.model_copy(update={"made_by": "latest"}))
    assert newest.clean() > 0
    assert Store(store.uri, store.version).manifest.made_by == "test"
    assert Store(store.uri).manifest.made_by == "latest"
    with pytest.raises(UserError, match=f"version {newer.version} cannot be opened"):
        Store(store.uri, newer.version)


def test_what_is_no_store_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store; make one with"):
        Store(str(tmp_path / "nothing"))
    store = make_store(tmp_path / "s")
    import shutil

    shutil.rmtree(tmp_path / "s" / "manifest")
    with pytest.raises(UserError, match="records, texts, checksums of a store but no manifest"):
        Store(store.uri)
    with pytest.raises(UserError, match="has no latents '512'; it has 16"):
        store.latents("512")


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("positions", ["true", "all"])
def test_embeddings_keep_their_direction(dtype: str, positions: str) -> None:
    column = TextColumn(
        name="t", encoder=Identity("test"), width=1024, max_tokens=9, positions=positions, dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 4)[:, None, None]
    text_BSD = torch.randn(4, 9, 1024, generator=generator) * scale
    true_B = torch.tensor([1, 9, 4, 3])
    mask_BS = torch.arange(9)[None] < true_B[:, None]
    got_BSD, got_mask_BS = unpack(column, pack(column, text_BSD, mask_BS))
    assert np.array_equal(got_mask_BS, mask_BS.numpy())
    stored = mask_BS if positions == "true" else torch.ones_like(mask_BS)
    cosine = torch.cosine_similarity(torch.from_numpy(got_BSD), text_BSD, dim=-1)
    assert cosine[stored].min() >= 0.999
    assert not got_BSD[~stored.numpy()].any()
    norms = torch.from_numpy(got_BSD).norm(dim=-1) / text_BSD.norm(dim=-1)
    assert (norms[stored] - 1).abs().max() < 0.01


def test_a_position_of_zeros_and_a_huge_one_survive() -> None:
    column = TextColumn(
        name="t", encoder=Identity("test"), width=4, max_tokens=2, positions="true", dtype="int8"
    )
    text_BSD = torch.tensor([[[0.0, 0, 0, 0], [1e6, -1e6, 5e5, 0]]])
    got_BSD, _ = unpack(column, pack(column, text_BSD, torch.ones(1, 2, dtype=torch.bool)))
    assert not got_BSD[0, 0].any()
    assert np.allclose(got_BSD[0, 1], text_BSD[0, 1], rtol=0.01)


def test_a_journal_survives_a_torn_line_and_refuses_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "s" / ".work" / "job"
    journal = Journal(folder, {"batch": 4})
    journal.add({"unit": 0})
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"unit": 1, "to')
    again = Journal(folder, {"batch": 4})
    assert again.entries == [{"unit": 0}]
    again.add({"unit": 1})
    again.close()
    assert Journal(folder, {"batch": 4}).entries == [{"unit": 0}, {"unit": 1}]
    with pytest.raises(UserError, match="was begun with batch=4, now it is 5"):
        Journal(folder, {"batch": 5})
