"""Weights of others: where they are, what to say when they are not there, and how to tell them apart."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoestring.interfaces import Identity
from shoestring.runtime import UserError

Loaded = TypeVar("Loaded")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Values of ``data.codec_dtype`` and ``data.text_encoder_dtype``."""
HUB_TIMEOUT_S = 10.0
"""How long to wait for the hub's first answer."""


@dataclass(frozen=True)
class Source:
    """Where the weights of a codec or text encoder are, and what they should be."""

    field: str
    """Setting that names the place, e.g. ``data.codec_path``."""
    place: str
    """Folder or hub name."""
    what: str
    """What it should hold, e.g. "a diffusers AutoencoderKL"."""
    files: str
    """The files of it that are read, for people."""

    @property
    def is_folder(self) -> bool:
        """Whether the place exists on this machine; a folder goes before a hub name."""
        return Path(self.place).exists()

    def mistake(self, reason: str) -> UserError:
        """The error of weights that are there and do not serve."""
        return UserError(
            f"{self.field} is {self.place!r}: cannot load {self.what} from it ({reason}); it needs "
            f"{self.files}"
        )

    def identity(self, name: str, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Identity:
        """Which weights were loaded; see :func:`weights_digest`.

        Args:
            name: kind of codec or encoder.
            state: its weights.
            settings: what else changes its results.

        Returns:
            The identity, with the commit where the weights came from the hub.
        """
        return Identity(name, self.place, self.commit(), weights_digest(state, settings))

    def commit(self) -> str:
        """Commit of the hub that its cache on this machine holds; empty = none, or a folder."""
        if self.is_folder:
            return ""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        for file in ("config.json", "vae/config.json"):
            try:
                found = try_to_load_from_cache(self.place, file)
            except HFValidationError:  # no name that the hub may have
                return ""
            if isinstance(found, str):
                return found.removesuffix(file).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
        return ""


def required(field: str, place: str | None, reader: str) -> str:
    """The place of weights that have no default.

    Args:
        field: setting that names the place.
        place: its value.
        reader: setting that needs it, e.g. ``data.codec=taef2``.

    Returns:
        The place.

    Raises:
        UserError: if it is not set.
    """
    if place is None:
        raise UserError(f"{field} is not set; {reader} needs the folder or hub name of its weights")
    return place


def load(source: Source, library: str, loader: Callable[[bool], Loaded]) -> Loaded:
    """Load weights: from a folder, else from the hub's cache on this machine, else from the hub.

    The cache goes first, so that a run needs no network once it has its weights, and keeps the ones it
    began with.

    Args:
        source: where they are.
        library: package that reads them, ``diffusers`` or ``transformers``.
        loader: called with whether only files of this machine may be read.

    Returns:
        What the loader returns.

    Raises:
        UserError: if the weights are not there or do not serve.
    """
    try:
        with quiet(library):
            return _attempt(source, loader, only_local=True)
    except UserError as error:
        if source.is_folder:
            raise
        in_cache = error
    try:
        _check_hub(source)
    except UserError as error:
        if source.commit() == "":
            raise
        raise UserError(
            f"{in_cache}; what the hub's cache on this machine lacks, 'hf download {source.place}' fetches "
            "where there is a network"
        ) from error
    return _attempt(source, loader, only_local=False)


def load_network(source: Source, model: Any, kinds: Sequence[str], *companions: Any) -> tuple[Any, ...]:
    """Load a whole network of transformers in float32, with its tokenizer or processor.

    Args:
        source: where the weights are.
        model: class of the network.
        kinds: values of ``model_type`` in ``config.json`` that fit.
        *companions: classes of what comes with it.

    Returns:
        The network, then the companions.

    Raises:
        UserError: if the weights are not there, incomplete or another network's.
    """
    from transformers import AutoConfig

    def loader(only_local: bool) -> tuple[Any, ...]:
        kind = AutoConfig.from_pretrained(source.place, local_files_only=only_local).model_type
        if kind not in kinds:
            raise source.mistake(f"the model_type in its config.json is {kind}")
        others = [each.from_pretrained(source.place, local_files_only=only_local) for each in companions]
        network, info = model.from_pretrained(
            source.place, local_files_only=only_local, dtype=torch.float32, output_loading_info=True
        )
        check_complete(source, info["missing_keys"])
        return (network, *others)

    return load(source, "transformers", loader)


def _attempt(source: Source, loader: Callable[[bool], Loaded], only_local: bool) -> Loaded:
    from safetensors import SafetensorError

    try:
        return loader(only_local)
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        AttributeError,
        SafetensorError,
    ) as error:
        # What the libraries raise for files that are missing, cut short or of something else.
        raise source.mistake(_first_line(error)) from error


def _check_hub(source: Source) -> None:
    """Ask the hub for the repository once: the libraries would ask six times for each file, for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    # The base of what its HTTP library raises; which library that is depends on its version.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # isort: skip

    here = f"{source.field} is {source.place!r}"
    try:
        HfApi().model_info(source.place, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(
            f"{here}, which is neither a folder that exists nor a hub name like owner/name; give either, "
            f"with {source.files}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{here}: no such folder, and the hub has no such repository or keeps it private (then run "
            "'hf auth login'); check the name"
        ) from error
    except (OSError, HTTPError) as error:
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else _first_line(error)
        raise UserError(
            f"{here}: no such folder, not in the hub's cache on this machine, and the hub cannot be asked "
            f"({reason}); run 'hf download {source.place}' where there is a network, or give a folder with "
            f"{source.files}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep a library's progress bars, warnings and loading reports out of our output."""
    logging: Any = importlib.import_module(f"{library}.utils.logging")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def check_complete(source: Source, missing: set[str] | list[str]) -> None:
    """Refuse weights with holes, which the libraries would fill with random numbers.

    Args:
        source: where the weights came from.
        missing: names of parameters that the files lack.

    Raises:
        UserError: if there are any.
    """
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise source.mistake(f"its weights lack {min(missing)}{more}")


def check_finite(values: Tensor, field: str, dtype: torch.dtype) -> None:
    """Refuse results that left the range of half precision.

    Args:
        values: results.
        field: setting of the precision, e.g. ``data.codec_dtype``.
        dtype: the precision; only float16 is looked at, others have the range of float32.

    Raises:
        UserError: if a value is infinite or no number.
    """
    if dtype == torch.float16 and not values.isfinite().all():
        raise UserError(f"{field} is fp16, in which these weights overflow; set {field}=bf16 or fp32")


def weights_digest(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """A hash of weights (names, types, shapes, values) and settings; about a second for a gigabyte.

    Args:
        state: tensors by name, on any device, in any order.
        settings: plain values that change results and are no weights.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
