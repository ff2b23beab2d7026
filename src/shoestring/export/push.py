"""To a hub: folders of ours, and model files with a card inside."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from shoestring.export.card import TO_FILL
from shoestring.export.place import read_mark
from shoestring.models.files import is_own, read_header
from shoestring.runtime import UserError

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """What goes to the hub."""

    files: dict[str, Path]
    """By name in the repository."""
    card: str

    def listed(self) -> list[str]:
        """A line a file, with its size, and the sum."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes.setdefault(CARD, len(self.card.encode()))
        rows = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
        return [*rows, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files"]

    def left_open(self) -> bool:
        """Whether the card has fields that only its author can fill."""
        return TO_FILL in self.card or TO_FILL.replace(" ", "-") in self.card


def collect(source: Path) -> Upload:
    """What a folder or file of ours has for a hub.

    Args:
        source: an export folder, or a model file with a card.

    Returns:
        Its files.

    Raises:
        UserError: if it is none of ours, or lacks a card.
    """
    if source.is_dir():
        if read_mark(source) is None:
            raise UserError(
                f"{source} is no export of shoestring; make one with shoestring export RUN --to ..."
            )
        files = {str(p.relative_to(source)): p for p in sorted(source.rglob("*")) if p.is_file()}
        if CARD not in files:
            raise UserError(f"{source} has no {CARD}; a model needs a card, so export it anew")
        return Upload(files, files[CARD].read_text(encoding="utf-8"))
    if not source.is_file() or not is_own(source):
        what = "is no model file of shoestring" if source.exists() else "does not exist"
        raise UserError(f"{source} {what}; give a folder or file that shoestring export made")
    card = read_header(source).card
    if card is None:
        raise UserError(f"{source} has no card inside; make a file with one with shoestring export --to file")
    return Upload({"model.safetensors": source}, card)


def check_name(repository: str) -> None:
    """Refuse what is no name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository; it is OWNER/NAME") from error
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no name of a repository; it is OWNER/NAME")


def push(upload: Upload, repository: str, private: bool = False) -> str:
    """Upload.

    Args:
        upload: of :func:`collect`.
        repository: OWNER/NAME; made if it is not there.
        private: whether a new repository is.

    Returns:
        The address of the commit.

    Raises:
        UserError: if there is no network or no token, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

    api = HfApi()
    try:
        api.whoami()
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            card = Path(place) / CARD
            card.write_text(upload.card, encoding="utf-8")
            files = {CARD: card} | upload.files
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            done = api.create_commit(repository, operations, commit_message="Export of shoestring")
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"cannot push to {repository}: no token; run 'hf auth login', or set HF_TOKEN"
        ) from error
    except (OSError, HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot push to {repository}: {reason}; --dry-run needs no network") from error
    return str(done.commit_url)
