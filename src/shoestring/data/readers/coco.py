"""COCO: a JSON file of annotations, and a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoestring.data.readers.base import NO_PICTURE, Options, read_inside
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError


class CocoReader:
    """All captions of each picture; the ids are COCO's. Captions of absent pictures come at the end."""

    kind = "coco"
    credit = ""

    def __init__(self, path: str, options: Options) -> None:
        """Read the annotations.

        Args:
            path: the JSON file.
            options: ``images`` is the folder of the pictures, by default that of the file.

        Raises:
            UserError: if the file cannot be read, or holds no captions.
        """
        self.path, self.options = path, options
        content = _read(Path(path))
        self.images = options.images or Path(path).parent
        if not self.images.is_dir():
            raise UserError(
                f"--images is {str(self.images)!r}, which is not a folder; give that of the pictures"
            )
        self._pictures: list[tuple[str, str]] = []
        for entry in content["images"]:
            if "id" not in entry or not isinstance(entry.get("file_name"), str):
                raise UserError(f"{path}: an image has no id or no file_name ({str(entry)[:80]})")
            self._pictures.append((str(entry["id"]), entry["file_name"]))
        self._captions: dict[str, list[str]] = {}
        for note in content["annotations"]:
            if "image_id" not in note or not isinstance(note.get("caption"), str):
                raise UserError(
                    f"{path}: an annotation has no image_id or no caption ({str(note)[:80]}); give the file "
                    "of captions, whose name begins with captions_"
                )
            self._captions.setdefault(str(note["image_id"]), []).append(note["caption"])
        known = {name for name, _ in self._pictures}
        self._lost = sorted(name for name in self._captions if name not in known)
        self.total: int | None = len(self._pictures) + len(self._lost)

    def items(self, start: int = 0) -> Iterator[Picture | Rejection]:
        """In the order of the file."""
        for name, file in self._pictures[start:]:
            data = read_inside(self.images, file)
            if isinstance(data, str):
                yield Rejection(name, data, NO_PICTURE)
            else:
                yield Picture(name, data, tuple(self._captions.get(name, ())), {})
        for name in self._lost[max(0, start - len(self._pictures)) :]:
            reason = f"{len(self._captions[name])} captions of a picture that the file does not list"
            yield Rejection(name, reason, NO_PICTURE)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not is_coco(content):
        raise UserError(
            f'{path} is not COCO: an object with the lists "images" and "annotations" is needed; give the '
            "file of captions, whose name begins with captions_"
        )
    return dict(content)


def is_coco(content: Any) -> bool:
    """Whether JSON has the lists that COCO's annotations have."""
    return isinstance(content, dict) and all(
        isinstance(content.get(name), list) and all(isinstance(entry, dict) for entry in content[name])
        for name in ("images", "annotations")
    )
