"""Verify: whatever is damaged in a store is found and named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from shoestring.data.ingest import ingest
from shoestring.data.readers import open_reader
from shoestring.data.store import Store, save_checksums, save_manifest
from shoestring.data.tables import child, commit_new, write_piece
from shoestring.data.verify import verify
from shoestring.runtime import UserError
from stores import BUCKETS, make_store


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store with two versions and a pin."""
    folder = tmp_path_factory.mktemp("sound") / "s"
    store = make_store(folder, rows=5, unit_rows=3)
    store.pin("run-1")
    save_manifest(store.uri, store.manifest.model_copy(update={"made_by": "later"}))
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_sound_store_has_no_findings(sound: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = verify(str(sound), lambda done, total: calls.append((done, total)))
    assert found.problems == []
    assert found.notes == []
    assert found.files == len(files_of(sound)) - 3 - 4  # seals check themselves, hints are compared
    assert calls[-1] == (found.bytes, found.bytes)


def test_every_file_cut_short_or_gone_is_found_and_named(sound: Path) -> None:
    for path in files_of(sound):
        if path.name == "latest_version_hint.json":
            continue  # Lance needs none: it looks
        data = path.read_bytes()
        name = path.relative_to(sound).as_posix()
        path.write_bytes(data[:-1])
        assert any(name in problem for problem in verify(str(sound)).problems), f"{name} cut short"
        path.unlink()
        assert any(name in problem for problem in verify(str(sound)).problems), f"{name} gone"
        path.write_bytes(data)
    assert verify(str(sound)).problems == []


def test_a_flipped_bit_anywhere_is_found_and_named(sound: Path) -> None:
    for path in files_of(sound):
        data = path.read_bytes()
        name = path.relative_to(sound).as_posix()
        for position in {0, len(data) // 3, len(data) * 2 // 3, len(data) - 1}:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            problems = verify(str(sound)).problems
            assert any(name in problem for problem in problems), f"{name} at {position}: {problems}"
        path.write_bytes(data)
    assert verify(str(sound)).problems == []


def test_bytes_that_belong_to_no_version_are_only_noted(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(sound, folder)
    (folder / "records" / "data" / "left.lance").write_bytes(b"of a killed writer")
    (folder / ".work" / "prepare").mkdir(parents=True)
    (folder / ".work" / "prepare" / "journal.jsonl").write_text("{}\n")
    found = verify(str(folder))
    assert found.problems == []
    assert len(found.notes) == 2
    assert "the job prepare has not ended" in found.notes[0]
    assert "1 files belong to no version" in found.notes[1]
    Store(str(folder)).clean()
    shutil.rmtree(folder / ".work")
    assert verify(str(folder)) == verify(str(folder))
    assert verify(str(folder)).notes == []


def test_old_versions_may_go_but_not_pinned_ones(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(sound, folder)
    store = Store(str(folder))
    for name in ("a", "b"):
        save_manifest(store.uri, store.manifest.model_copy(update={"made_by": name}))
    assert store.version == 2
    Store(str(folder)).clean()
    assert verify(str(folder)).problems == []
    assert [Store(str(folder), version).manifest.made_by for version in (1, 4)] == ["test", "b"]
    with pytest.raises(UserError, match="version 2 cannot be opened"):
        Store(str(folder), 2)
    shutil.rmtree(folder / "texts" / "_refs")
    problems = verify(str(folder)).problems
    assert problems == ["texts/_refs/tags/run-1.json is absent"]


def test_cleaning_keeps_what_the_manifest_names_though_a_killed_job_wrote_after_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", rows=5, unit_rows=3)
    before = store.records.to_table()
    piece = write_piece(child(store.uri, "records"), before)
    commit_new(child(store.uri, "records"), before.schema, [piece, piece])  # and killed before its manifest
    store.clean()
    assert Store(store.uri).records.to_table() == before
    assert verify(store.uri).problems == []


def test_an_absent_seal_is_said_and_made_anew_by_a_pin(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(sound, folder)
    (folder / "seals" / "2.json").unlink()
    (problem,) = verify(str(folder)).problems
    assert problem.startswith("seals/2.json is absent")
    Store(str(folder)).pin("run-2")
    assert verify(str(folder)).problems == []


def test_a_damaged_store_opens_with_a_sentence_or_not_at_all(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(sound, folder)
    for path in [
        *(folder / "manifest" / "_versions").glob("*.manifest"),
        *(folder / "manifest" / "data").iterdir(),
    ]:
        data = path.read_bytes()
        for position in range(0, len(data), 7):
            path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
            try:
                Store(str(folder))
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
        path.write_bytes(data)


def test_what_is_no_store_or_half_of_one_cannot_be_verified(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store"):
        verify(str(tmp_path / "nothing"))
    shutil.copytree(sound, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "manifest" / "_versions")
    with pytest.raises(UserError, match="records, texts, checksums of a store but no manifest"):
        verify(str(tmp_path / "s"))
    shutil.copytree(sound, tmp_path / "t")
    shutil.rmtree(tmp_path / "t" / "records" / "data")
    problems = verify(str(tmp_path / "t")).problems
    assert len(problems) == 2
    assert all("is absent" in problem for problem in problems)
    shutil.copytree(sound, tmp_path / "u")
    shutil.rmtree(tmp_path / "u" / "texts")
    problems = verify(str(tmp_path / "u")).problems
    assert any(problem.startswith("texts/_versions/") and "is absent" in problem for problem in problems)


def altered(folder: Path, **columns: Callable[[list[Any]], None]) -> Store:
    """A store with sound files whose rows were changed: ``table_column`` to a function of its values."""
    store = make_store(folder, rows=6, unit_rows=6, buckets=BUCKETS)
    versions, sums = dict(store.manifest.tables), []
    for name in ("records", "texts"):
        table = (store.records if name == "records" else store.texts).to_table()
        for key, change in columns.items():
            if key.startswith(f"{name}_"):
                column = key.removeprefix(f"{name}_")
                values = table[column].to_pylist()
                change(values)
                index = table.schema.get_field_index(column)
                table = table.set_column(
                    index, table.schema.field(index), pa.array(values, table.schema.types[index])
                )
        piece = write_piece(child(store.uri, name), table)
        versions[name] = commit_new(child(store.uri, name), table.schema, [piece]).version
        sums += [(name, file) for file in piece.files]
    versions["checksums"] = save_checksums(store.uri, sums)
    return save_manifest(store.uri, store.manifest.model_copy(update={"tables": versions}))


def put(row: int, value: object) -> Callable[[list[Any]], None]:
    return lambda values: values.__setitem__(row, value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"records_id": put(3, "r000001")},
            "1 values of id occur more than once in the records, e.g. 'r000001'",
        ),
        ({"records_id": put(3, None)}, "1 records have no id"),
        ({"texts_text": put(3, "caption 1")}, "1 values of text occur more than once in the texts"),
        ({"records_caption_source": put(3, [1, 6])}, "1 entries of caption_source point to no text"),
        (
            {"records_moments_16": put(3, b"xy")},
            "1 values of moments_16 do not have the bytes of their bucket",
        ),
        (
            {"records_moments_16": put(3, None)},
            "1 values of moments_16 do not have the bytes of their bucket",
        ),
        ({"records_bucket_16": put(3, 7)}, "1 values of moments_16 do not have the bytes of their bucket"),
        ({"records_bucket_16": put(0, 1)}, r"hold \(1, 3, 2\) pictures, the manifest says \(2, 2, 2\)"),
        ({"texts_t_tokens": put(3, b"")}, "1 embeddings t do not have the bytes of their tokens"),
        ({"texts_t_true": put(3, 8)}, "1 embeddings t do not have the bytes of their tokens"),
    ],
)
def test_rows_that_contradict_the_manifest_are_found(
    tmp_path: Path, columns: dict[str, Callable[[list[Any]], None]], said: str
) -> None:
    problems = verify(altered(tmp_path / "s", **columns).uri).problems
    assert any(re.search(said, problem) for problem in problems), problems


def test_a_manifest_that_contradicts_itself_is_found(tmp_path: Path) -> None:
    store = altered(tmp_path / "s")
    assert verify(store.uri).problems == []
    (source,) = store.manifest.sources
    source = source.model_copy(update={"read": 9, "kept": 5, "rejected": {"too small": 1}})
    save_manifest(store.uri, store.manifest.model_copy(update={"sources": (source,)}))
    problems = " ".join(verify(store.uri).problems)
    assert "9 records read, but 5 kept and 1 rejected" in problems
    assert "its sources kept 5 records, but it holds 6" in problems


def test_the_list_of_what_was_rejected_is_verified_too(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / "a.png")
    (source / "a.txt").write_text("a")
    (source / "b.png").write_bytes(b"no picture")
    (source / "b.txt").write_text("b")
    store = ingest(open_reader(f"folder:{source}"), str(tmp_path / "raw"))
    found = verify(store.uri)
    assert (found.problems, found.notes) == ([], [])
    for path in files_of(tmp_path / "raw" / "rejected"):
        data, name = path.read_bytes(), path.relative_to(tmp_path / "raw").as_posix()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert any(name in problem for problem in verify(store.uri).problems), name
        path.write_bytes(data)
    (tmp_path / "raw" / "rejected" / "data" / "left.lance").write_bytes(b"of a killed writer")
    assert "rejected/data/left.lance" in verify(store.uri).notes[0]
