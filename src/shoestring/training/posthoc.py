"""Averages of any length, made after training from stored power-function averages.

Every stored average is the integral of a known power function over the weights of the run. A wanted power
function is approximated by a weighted sum of the stored ones, by least squares; the same sum of the stored
averages is then the wanted average, as far as the fit is good.

Source: Karras et al., arXiv 2312.02696 (EDM2), section 3.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.models.files import Header, read_header, write_model
from shoestring.runtime import UserError
from shoestring.training.averages import power_gamma, track_name

PATTERN = "power-*.safetensors"
RUN_FOLDERS = ("snapshots", "checkpoints")
FITS = 0.05
"""A relative residual that is still said to be a good fit."""
TABLES = ("pos_embed", "decoder_pos_embed")
"""Tensors of a model file that are not learned: taken from the newest file as they are."""


@dataclass(frozen=True)
class Stored:
    """A stored power-function average."""

    path: Path
    length: float
    nimg: int
    """Images seen when it was stored."""
    header: Header


@dataclass(frozen=True)
class Made:
    """An average that was made."""

    path: Path
    length: float
    residual: float
    """Of the fit: norm of (wanted - fitted) power function by that of the wanted one; 0 is perfect."""

    @property
    def fits(self) -> bool:
        """Whether the fit is good."""
        return self.residual <= FITS


Numbers = NDArray[np.float64]


def overlap(gamma_a: Numbers, nimg_a: Numbers, gamma_b: Numbers, nimg_b: Numbers) -> Numbers:
    """Inner product of power functions p(n) = (gamma + 1) / N (n / N)^gamma, which are zero beyond N.

    Args:
        gamma_a: exponents of the first.
        nimg_a: their N.
        gamma_b: exponents of the second, broadcast against the first.
        nimg_b: their N.

    Returns:
        The integral of the product over n.
    """
    first, last = np.minimum(nimg_a, nimg_b), np.maximum(nimg_a, nimg_b)
    later = np.where(nimg_a > nimg_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** later / last


def fit(stored: Sequence[tuple[float, int]], gamma: float, nimg: int) -> tuple[Numbers, float]:
    """Coefficients of stored averages that give the best approximation of a wanted one.

    Least squares between power functions, in float64, with the sum of the coefficients held at one: without
    that (as in the paper) few snapshots give a sum of 0.9, say, and all weights would shrink by a tenth,
    while the residual is nearly the same.

    Args:
        stored: exponent and images seen of every stored average.
        gamma: exponent of the wanted one.
        nimg: images seen at its end.

    Returns:
        A coefficient each, and the relative residual.
    """
    gammas, nimgs = (np.array(column, dtype=np.float64) for column in zip(*stored, strict=True))
    nimgs = nimgs / nimg
    one, wanted = np.ones(()), np.full((), gamma)
    own = overlap(gammas[:, None], nimgs[:, None], gammas, nimgs)
    with_wanted = overlap(gammas, nimgs, wanted, one)
    norm = np.sqrt(np.diag(own))  # short averages have large norms: unit norms condition the system better
    count = len(stored)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = own / np.outer(norm, norm)
    system[:count, count] = system[count, :count] = 1 / norm
    right = np.append(with_wanted / norm, 1.0)
    coefficients = np.linalg.lstsq(system, right, rcond=None)[0][:count] / norm
    size = float(overlap(wanted, one, wanted, one))
    distance = size - 2 * coefficients @ with_wanted + coefficients @ own @ coefficients
    return coefficients, float(np.sqrt(max(0.0, distance) / size))


def find_stored(places: Sequence[Path]) -> list[Stored]:
    """The stored averages of checkpoint folders and run folders, oldest first, each once.

    Args:
        places: folders that hold ``power-0.05.safetensors`` and the like, or run folders: then all their
            checkpoints and snapshots.

    Returns:
        What was found.

    Raises:
        UserError: if a folder holds none, or they are not of one model and one run.
    """
    found: dict[tuple[int, str], Stored] = {}
    for place in places:
        for path in _files(place):
            header = read_header(path)
            stored = Stored(path, _length(path), header.facts.nimg, header)
            if not stored.nimg:  # saved before the first step: an average of nothing
                continue
            key = (stored.nimg, path.name)
            first = next(iter(found.values()), stored)
            _check_together(first, stored)
            before = found.setdefault(key, stored)
            # A deleted checkpoint's average moves to the snapshots: seen in both places, it is the same.
            if before is not stored and _run_folder(before.path) != _run_folder(path):
                raise UserError(
                    f"{before.path} and {path} are averages at the same image of two runs; give the folders "
                    "of one run"
                )
    if not found:
        raise UserError(f"{places[0]} holds averages of a run that has not seen an image yet; train first")
    return sorted(found.values(), key=lambda stored: (stored.nimg, stored.length))


def _files(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        raise UserError(f"{place} is not a folder; give a run folder, or checkpoint folders")
    files = sorted(place.glob(PATTERN))
    for name in RUN_FOLDERS:
        files += sorted(place.glob(f"{name}/[0-9]*/{PATTERN}"))
    if not files:
        raise UserError(
            f"{place} holds no power-function averages (power-*.safetensors); train with "
            "power_ema=[0.05,0.1] to keep them"
        )
    yield from files


def _length(path: Path) -> float:
    try:
        length = float(path.stem.removeprefix("power-"))
        power_gamma(length)
    except ValueError as error:  # a UserError too
        raise UserError(
            f"{path} is not named after the length of its average; the name it was written under is, e.g., "
            "power-0.05.safetensors"
        ) from error
    return length


def _run_folder(path: Path) -> Path:
    """The run that a file lies in; of a checkpoint copied elsewhere, the folder that it was copied to."""
    folder = path.resolve().parent.parent
    return folder.parent if folder.name in RUN_FOLDERS else folder


def _check_together(first: Stored, other: Stored) -> None:
    """Refuse to mix what does not belong together."""
    a, b = first.header.config, other.header.config
    speed = {"attention", "checkpoint_activations"}  # may change while a run goes on
    models = [config.model.model_dump(exclude=speed) for config in (a, b)]
    if models[0] != models[1] or a.process != b.process:
        raise UserError(f"{first.path} and {other.path} are of different models; give the folders of one run")
    if (a.name, a.seed) != (b.name, b.seed):
        raise UserError(
            f"{first.path} and {other.path} are of different runs ({a.name}, seed {a.seed}, and {b.name}, "
            f"seed {b.seed}); give the folders of one run"
        )


def combine(stored: Sequence[Stored], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """A weighted sum of stored averages, summed in float64 file by file.

    Args:
        stored: at least one; tensors that are not learned are those of the last.
        coefficients: one each.

    Returns:
        float32 tensors by name.

    Raises:
        UserError: if a file is damaged, or their tensors differ in name or shape.
    """
    total: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for each, coefficient in zip(stored, coefficients, strict=True):
        tensors = read_header(each.path, None).tensors
        tables = {name: tensors.pop(name) for name in TABLES if name in tensors}
        if not total:
            total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
        for name in total.keys() | tensors.keys():
            if name not in total or name not in tensors or total[name].shape != tensors[name].shape:
                raise UserError(f"{each.path} is of another model than {stored[0].path}: {name} differs")
        for name, tensor in tensors.items():
            total[name].add_(tensor, alpha=coefficient)
    return {name: tensor.float() for name, tensor in total.items()} | tables


def reconstruct(
    places: Sequence[Path],
    lengths: Sequence[float],
    out: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Made]:
    """Make averages at the newest of some snapshots, as model files that ``shoestring sample`` reads.

    Args:
        places: see :func:`find_stored`.
        lengths: wanted, as shares of the run.
        out: folder of the files; ``None`` = ``averages`` in the run folder.
        progress: told what is being made.

    Returns:
        The files, with how good each fit is.

    Raises:
        UserError: if there is nothing to make them of, or a file cannot be read or written.
    """
    gammas = [power_gamma(length) for length in lengths]
    stored = find_stored(places)
    last = stored[-1]
    out = out if out is not None else _run_folder(last.path) / "averages"
    made = []
    for length, gamma in zip(lengths, gammas, strict=True):
        progress(f"length {length:g}, from {len(stored)} stored averages")
        coefficients, residual = fit([(power_gamma(s.length), s.nimg) for s in stored], gamma, last.nimg)
        tensors = combine(stored, coefficients.tolist())
        path = out / f"ema-{length:g}-at-{last.nimg:09d}.safetensors"
        facts = replace(last.header.facts, weights=track_name(length))
        write_model(path, tensors, last.header.config, facts)
        made.append(Made(path, length, residual))
    return made
