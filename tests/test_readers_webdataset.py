"""WebDataset tars: whole, packed, cut, from a server that breaks off."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.data.readers import Options, open_reader, webdataset
from shoestring.data.readers.webdataset import expand
from shoestring.data.records import Picture, Rejection
from test_readers import check_starts, jpeg, pictures, rejected, says


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """Of each: picture, then caption, then JSON."""
    files = []
    for i in range(first, first + count):
        fields = {"caption": f"long {i}", "nsfw": i / 10}
        files += [
            (f"{i:05}.jpg", jpeg(i)),
            (f"{i:05}.txt", f"caption {i}\n".encode()),
            (f"{i:05}.json", json.dumps(fields).encode()),
        ]
    return files


def test_tars_local_and_packed(tmp_path: Path) -> None:
    (tmp_path / "00.tar").write_bytes(tar_of(samples(0, 3)))
    (tmp_path / "01.tar").write_bytes(tar_of(samples(3, 2)))
    reader = open_reader(f"webdataset:{tmp_path}/{{00..01}}.tar", Options(numbers=("nsfw",)))
    check_starts(reader)
    found = pictures(reader)
    assert list(found) == ["00/00000", "00/00001", "00/00002", "01/00003", "01/00004"]
    assert found["01/00004"].captions == ("caption 4\n",)
    assert found["01/00004"].data == jpeg(4)
    assert found["01/00004"].columns == {"nsfw": 0.4}
    both = open_reader(str(tmp_path), Options(captions=("txt", "caption")))
    assert pictures(both)["00/00001"].captions == ("caption 1\n", "long 1")
    packed = tmp_path / "02.tar.gz"
    packed.write_bytes(gzip.compress(tar_of(samples(0, 2))))
    assert list(pictures(open_reader(str(packed)))) == ["02/00000", "02/00001"]
    assert len(pictures(open_reader(str(tmp_path)))) == 7
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "00.tar").write_bytes(tar_of(samples(0, 3)))  # same name, same keys
    assert len(pictures(open_reader(str(tmp_path)))) == 10


def test_samples_that_lack_something(tmp_path: Path) -> None:
    files = [
        ("dir/", b""),
        ("dir/a.txt", b"no picture"),
        ("dir/b.png", jpeg(1)),
        ("dir/c.webp", jpeg(2)),
        ("dir/c.cls", b"7"),
        ("dir/d.jpg", jpeg(3)),
        ("dir/d.json", b"{oops"),
        ("dir/._e.jpg", b"of a Mac"),
        ("dir/e.jpg", jpeg(4)),
        ("dir/e.json", b'{"text": ["x", "y"]}'),
        ("dir/e.jpg", jpeg(5)),
        ("dir/e.txt", b"same key again"),
        ("dir/f.jpg", jpeg(6)),
        ("dir/f.txt", b"\xff\xfe"),
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(files[1:]))
    reader = open_reader(str(path))
    items = list(reader.items())
    captions = [(item.id, item.captions) for item in items if isinstance(item, Picture)]
    assert captions == [
        ("a/dir/b", ()),
        ("a/dir/c", ("7",)),
        ("a/dir/e", ("x", "y")),
        ("a/dir/e", ("same key again",)),
    ]
    assert {name: each.kind for name, each in rejected(reader).items()} == {
        "a/dir/a": "no picture",
        "a/dir/d": "no caption",
        "a/dir/f": "no caption",
    }


def test_a_cut_tar_gives_every_whole_sample_and_says_so(tmp_path: Path) -> None:
    """Wherever the cut is: in a picture, a caption, a header, between files or before the end mark."""
    whole = tar_of(samples(0, 3))
    path = tmp_path / "x.tar"
    sizes = [512 + -(-len(data) // 512) * 512 for _, data in samples(0, 3)]
    ends = [sum(sizes[: i + 1]) for i in range(9)]
    for cut in (*ends, *(end - 512 for end in ends), *(end + 100 for end in ends), 0, 100, 700):
        path.write_bytes(whole[:cut])
        items = list(open_reader(str(path)).items())
        assert isinstance(items[-1], Rejection), cut
        assert items[-1].kind == "tar cut"
        assert items[-1].item == str(path)
        # The first sample is whole with picture and caption, the others when they are as the first.
        whole_samples = [i for i in range(3) if cut >= ends[3 * i + (2 if i else 1)]]
        assert [item.id for item in items[:-1]] == [f"x/{i:05}" for i in whole_samples], cut
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(whole)[:-200])
    items = list(open_reader(str(tmp_path / "y.tar.gz")).items())
    assert items[-1].kind == "tar cut"
    damaged = bytearray(whole)
    damaged[ends[2] + 20] ^= 255  # in the name of the fourth file: its header's sum is wrong
    path.write_bytes(damaged)
    items = list(open_reader(str(path)).items())
    assert [getattr(item, "id", None) for item in items] == ["x/00000", None]
    path.write_text("<html>Not found</html>" * 100)
    assert "before its first sample" in rejected(open_reader(str(path)))[str(path)].reason


def test_bad_names_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of(samples(0, 1)))
    assert "(2 of 3 tars are absent)" in says(f"webdataset:{tmp_path}/{{0..2}}.tar")
    assert "programs are not started" in says("webdataset:pipe:cat x.tar")
    assert "is no range" in says(f"webdataset:{tmp_path}/{{0-2}}.tar")
    assert "has no column 'aesthetic'; it has jpg, txt, json, caption, nsfw" in says(
        tmp_path / "0.tar", numbers=("aesthetic",)
    )
    assert expand("a{08..10}b{x,y}") == ["a08bx", "a08by", "a09bx", "a09by", "a10bx", "a10by"]


# -- from a server -----------------------------------------------------------------------------------------


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Breaks off in the middle of ``broken.tar``, each time but the last."""

    breaks: int = 0

    def do_GET(self) -> None:
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes() if "no" not in self.path else None
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if "broken" in self.path and type(self).breaks > 0:
            type(self).breaks -= 1
            data = data[: len(data) * 2 // 3]
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as opened:
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{opened.server_address[1]}"
        opened.shutdown()
        thread.join()


def test_tars_from_urls(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "WAITS_S", (0.0, 0.0))
    (tmp_path / "0.tar").write_bytes(tar_of(samples(0, 3)))
    (tmp_path / "1.tar").write_bytes(tar_of(samples(3, 3))[:4000])
    (tmp_path / "broken.tar").write_bytes(gzip.compress(tar_of(samples(6, 20)), 0))
    reader = open_reader(f"{server}/{{0,1}}.tar")
    assert reader.kind == "webdataset"
    items = list(reader.items())
    assert [item.id for item in items[:3]] == ["0/00000", "0/00001", "0/00002"]
    assert items[-1].kind == "tar cut"  # cut on the server: that is the tar's fault
    assert items[-1].item == f"{server}/1.tar"
    _Handler.breaks = 2
    assert len(pictures(open_reader(f"{server}/broken.tar"))) == 20
    assert _Handler.breaks == 0
    _Handler.breaks = 3
    assert "give the same command to go on" in says(f"{server}/broken.tar")
    assert "HTTP 404" in says(f"{server}/no.tar")
    assert "cannot be read after 0 samples" in says("http://127.0.0.1:9/x.tar")
