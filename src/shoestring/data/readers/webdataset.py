"""WebDataset: tars in which neighbouring files of one name and several endings are one sample."""

from __future__ import annotations

import http.client
import itertools
import json
import lzma
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from shoestring.data.captions import check_names, numbers_of, texts_of
from shoestring.data.folder import NO_CAPTION, SUFFIXES
from shoestring.data.readers.base import NO_PICTURE, TARS, Options
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "text", "caption")
TAR_CUT = "tar cut"
TIMEOUT_S = 60
WAITS_S = (1.0, 4.0)
"""Before the second and the third try of a connection."""

Sample = tuple[str, dict[str, bytes]]


class WebDatasetReader:
    """Samples of tars, packed or not, local or from URLs; ids are tar and key, as in ``00012/000120007``."""

    kind = "webdataset"
    credit = ""

    def __init__(self, path: str, options: Options) -> None:
        """Look for the tars; URLs are opened when their turn comes.

        Args:
            path: a tar, a folder of tars, or a pattern like ``https://host/{0000..2175}.tar``.
            options: ``image`` is the ending of the pictures; ``captions``, ``id`` and ``numbers`` are endings
                of text files or fields of the samples' JSON. By default the caption is ``txt``, else
                the JSON's ``caption`` or ``text``, else the number in ``cls``.

        Raises:
            UserError: if a local tar is absent, or the pattern names none.
        """
        self.path, self.options = path, options
        self.total: int | None = None
        if path.startswith("pipe:"):
            raise UserError(f"webdataset:{path}: programs are not started; give files or URLs of tars")
        self.tars = _tars(path)
        bare = [re.sub(r"\.(tar|tgz|tar\.gz)$", "", tar.split("?")[0]) for tar in self.tars]
        short = [PurePosixPath(name).name for name in bare]
        # Tars of one name in several folders must not make equal ids.
        self._stems = dict(zip(self.tars, short if len(set(short)) == len(short) else bare, strict=True))
        absent = [tar for tar in self.tars if "://" not in tar and not Path(tar).is_file()]
        if absent:
            raise UserError(
                f"{absent[0]} does not exist ({len(absent)} of {len(self.tars)} tars are absent); copy the "
                "missing ones or name only those that are there"
            )

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """Samples in the order of the tars; passing over some means reading over them."""
        checked = False
        raw = itertools.chain.from_iterable(self._tar(tar) for tar in self.tars)
        for item in itertools.islice(raw, start, None):
            if isinstance(item, Rejection):
                yield item
                continue
            if not checked:
                checked = True
                self._check_names(item)
            yield self._picture(*item)

    # -- one tar -------------------------------------------------------------------------------------------

    def _tar(self, tar: str) -> Iterator[Sample | Rejection]:
        """All samples of a tar; a connection that breaks is begun again where it broke."""
        done = 0
        for wait in (*WAITS_S, None):
            try:
                for item in itertools.islice(self._once(tar), done, None):
                    yield item
                    done += 1
                return
            except urllib.error.HTTPError as error:
                if (error.code < 500 and error.code != 429) or wait is None:
                    raise UserError(
                        f"{tar} cannot be had (HTTP {error.code} {error.reason}); check the address, then "
                        "give the same command"
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                if "://" not in tar or wait is None:
                    raise UserError(
                        f"{tar} cannot be read after {done} samples ({error}); give the same command to go "
                        "on from here"
                    ) from error
            time.sleep(wait)

    def _once(self, tar: str) -> Iterator[Sample | Rejection]:
        stem = self._stems[tar]
        key: str | None = None
        files: dict[str, bytes] = {}
        usual: set[str] = set()  # endings of the sample before
        with _open(tar) as stream:
            damage = "it ends too early"
            try:
                with _Tar.open(fileobj=stream, mode="r|*") as opened:
                    for member in opened:
                        name = PurePosixPath(member.name)
                        if not member.isfile() or name.name.startswith(".") or name.name.startswith("__"):
                            continue
                        base, _, ending = name.name.partition(".")
                        mine, ending = (name.parent / base).as_posix(), ending.lower()
                        if key is not None and (mine != key or ending in files):
                            yield f"{stem}/{key}", files
                            usual, files = set(files), {}
                        key = mine
                        # None stands for a file that is not needed: it is passed over.
                        content = opened.extractfile(member) if self._wanted(ending) else None
                        files[ending] = b"" if content is None else content.read()
                    if opened.whole:
                        if key is not None:
                            yield f"{stem}/{key}", files
                        return
            except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
                damage = str(error)
        # The last sample may miss files that came after the cut.
        if key is not None and usual <= set(files) and self._captioned(key, files):
            yield f"{stem}/{key}", files
        near = "before its first sample" if key is None else f"near the sample {key}"
        yield Rejection(
            tar, f"the tar is cut or damaged {near} ({damage}); what follows is lost, copy it again", TAR_CUT
        )

    def _wanted(self, ending: str) -> bool:
        named = (self.options.image, *self.options.captions, *TEXTS, "json", "cls")
        return ending in named or _is_picture(ending)

    # -- one sample ----------------------------------------------------------------------------------------

    def _check_names(self, first: Sample) -> None:
        options, (name, files) = self.options, first
        asked = (options.image, *options.captions, options.id, *options.numbers)
        have = [*files, *(_json(files) or {})]
        check_names(f"{self.path} (sample {name})", have, [each for each in asked if each])

    def _captioned(self, key: str, files: dict[str, bytes]) -> bool:
        picture = self._picture(key, files)
        return isinstance(picture, Picture) and bool(picture.captions)

    def _picture(self, name: str, files: dict[str, bytes]) -> Picture | Rejection:
        image = self.options.image or next((ending for ending in PICTURES if ending in files), None)
        image = image or next((ending for ending in files if _is_picture(ending)), None)
        if image is None or not files.get(image):
            return Rejection(name, f"no picture among {', '.join(files)}", NO_PICTURE)
        fields = _json(files)
        if fields is None:
            return Rejection(name, "its JSON cannot be read", NO_CAPTION)
        if self.options.id is not None and fields.get(self.options.id) is not None:
            name = str(fields[self.options.id])
        try:
            captions = self._captions(files, fields)
        except UnicodeDecodeError as error:
            return Rejection(name, f"its caption is not UTF-8 text: {error}", NO_CAPTION)
        return Picture(name, files[image], captions, numbers_of(fields, self.options.numbers))

    def _captions(self, files: dict[str, bytes], fields: dict[str, Any]) -> tuple[str, ...]:
        named = self.options.captions
        found: list[str] = []
        for name in named or (*TEXTS, "cls"):
            value = fields.get(name)
            if name in files:
                value = files[name].decode("utf-8-sig")
            texts = texts_of(value) or ()
            if texts and not named:
                return texts
            found += texts
        return tuple(found)


def _is_picture(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in SUFFIXES


def _json(files: dict[str, bytes]) -> dict[str, Any] | None:
    """The fields of a sample's JSON; ``None`` where it cannot be read."""
    if "json" not in files:
        return {}
    try:
        fields = json.loads(files["json"])
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


# -- files and connections ---------------------------------------------------------------------------------


class _Info(tarfile.TarInfo):
    """Notes that a tar has reached its mark of the end: tarfile itself stops silently at a cut."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                cast(_Tar, tar).whole = True
            raise


class _Tar(tarfile.TarFile):
    whole = False
    tarinfo = _Info


class _Stream:
    """A download that raises if it ends before all was there, which is not the tar's fault."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        length = response.headers.get("Content-Length")
        self._left = int(length) if length and length.isdecimal() else None

    def read(self, size: int) -> bytes:
        data = self._response.read(size)
        if self._left is not None:
            self._left -= len(data)
            if not data and size and self._left > 0:
                raise ConnectionError(f"the connection ended, {self._left:,} bytes are missing")
        return data

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()


def _open(tar: str) -> Any:
    if tar.startswith(("http://", "https://")):
        return _Stream(urllib.request.urlopen(tar, timeout=TIMEOUT_S))  # noqa: S310 (http only)
    if "://" in tar:
        from shoestring.data.tables import filesystem

        files, path = filesystem(tar)
        return files.open_input_stream(path, compression=None)
    return cast(BinaryIO, Path(tar).open("rb"))


def _tars(path: str) -> Sequence[str]:
    if "://" not in path and Path(path).is_dir():
        tars = sorted(str(file) for file in Path(path).rglob("*") if file.name.endswith(TARS))
        if not tars:
            raise UserError(f"{path} holds no tar; give a folder of tars or a pattern: {{0000..0010}}.tar")
        return tars
    return expand(path)


def expand(pattern: str) -> list[str]:
    """Write out the braces of a pattern.

    Args:
        pattern: ``a{08..10}b`` is three names (with zeros in front as given), ``{x,y}`` two.

    Returns:
        The names in order; of several braces the last changes fastest.

    Raises:
        UserError: if a brace holds neither.
    """
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, closed, after = rest.partition("}")
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is not None and int(span[1]) <= int(span[2]):
        choices = [f"{i:0{len(span[1])}}" for i in range(int(span[1]), int(span[2]) + 1)]
    elif closed and "," in inside:
        choices = inside.split(",")
    else:
        raise UserError(f"{pattern}: {{{inside}}} is no range; write {{0000..0010}} or {{a,b}}")
    return [f"{before}{choice}{end}" for choice in choices for end in expand(after)]
