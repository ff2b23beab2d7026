"""Mean and covariance of features, the reference statistics of Fréchet distances, and their files."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from shoestring.runtime import UserError, atomic_write
from shoestring.tensors import Float, UInt8

NEGATIVE = 1e-6
"""A covariance has no negative eigenvalue; down to this share of the largest, it is rounding."""
LAYOUTS = {
    "shoestring": ("mean", "covariance"),
    "shoestring-spatial": ("mean_spatial", "covariance_spatial"),
    "adm": ("mu", "sigma"),
    "adm-spatial": ("mu_s", "sigma_s"),
}
"""Names of the two arrays in the files. clean-fid's are those of ADM."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of a set of features, float64."""

    mean_F: Float[Tensor, F]
    covariance_FF: Float[Tensor, "F F"]
    """Unbiased."""
    count: int | None = None
    """Samples that they were taken of; ``None`` where a file does not say."""
    made: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What made the features: extractor, resize, data, versions."""

    @staticmethod
    def of(features_NF: ArrayLike | Tensor, made: Mapping[str, str] | None = None) -> Moments:
        """The moments of a set.

        Args:
            features_NF: a row a sample.
            made: what made them.

        Returns:
            Its moments.

        Raises:
            ValueError: for fewer than two samples, or values that are not finite.
        """
        rows_NF = finite_rows(features_NF, "features", 2)
        mean_F = rows_NF.mean(dim=0)
        rows_NF = (rows_NF - mean_F) / math.sqrt(len(rows_NF) - 1)
        return Moments(mean_F, rows_NF.T @ rows_NF, len(rows_NF), MappingProxyType(dict(made or {})))

    def root(self) -> Float[Tensor, "F F"]:
        """Factor the covariance by its eigenvalues, which is exact at any rank.

        Returns:
            R with R'R = covariance.

        Raises:
            ValueError: if the matrix is no covariance.
        """
        symmetric_FF = (self.covariance_FF + self.covariance_FF.T) / 2
        if (self.covariance_FF - symmetric_FF).abs().max() > NEGATIVE * symmetric_FF.abs().max():
            raise ValueError("the matrix is not symmetric, so it is no covariance")
        values_F, vectors_FF = torch.linalg.eigh(symmetric_FF)
        if values_F[0] < -NEGATIVE * values_F[-1].abs():
            raise ValueError(
                f"the matrix has an eigenvalue of {values_F[0]:.3g} beside {values_F[-1]:.3g}, so it is no "
                "covariance"
            )
        return values_F.clamp(min=0).sqrt()[:, None] * vectors_FF.T


class RunningMoments:
    """Moments of features that come in pieces and are not kept; float64, merged as by Chan et al. 1979."""

    def __init__(self) -> None:
        self._count = 0
        self._mean_F = self._scatter_FF = torch.zeros((), dtype=torch.float64)

    def add(self, features_NF: Tensor) -> None:
        """Take in a piece.

        Args:
            features_NF: a row a sample; at least one.

        Raises:
            ValueError: if values are not finite.
        """
        rows_NF = finite_rows(features_NF, "features", 1)
        count, mean_F = len(rows_NF), rows_NF.mean(dim=0)
        centred_NF = rows_NF - mean_F
        apart_F, total = mean_F - self._mean_F, self._count + count
        between_FF = torch.outer(apart_F, apart_F) * (self._count * count / total)
        self._scatter_FF = self._scatter_FF + centred_NF.T @ centred_NF + between_FF
        self._mean_F = self._mean_F + apart_F * (count / total)
        self._count = total

    def moments(self, made: Mapping[str, str] | None = None) -> Moments:
        """Of all pieces.

        Args:
            made: what made the features.

        Returns:
            Their moments.

        Raises:
            ValueError: for fewer than two samples.
        """
        if self._count < 2:
            raise ValueError(f"features have {self._count} rows; at least 2 samples are needed")
        covariance_FF = self._scatter_FF / (self._count - 1)
        return Moments(self._mean_F, covariance_FF, self._count, MappingProxyType(dict(made or {})))


def write_moments(path: Path, moments: Moments, spatial: Moments | None = None) -> None:
    """Write moments with all that is known of them, as ``.npz``.

    Args:
        path: where to.
        moments: what.
        spatial: those of the spatial features of the same pictures, for sFID.

    Raises:
        UserError: if the file cannot be written.
    """
    about = {"count": moments.count, "made": dict(moments.made)}
    mean_F, covariance_FF = moments.mean_F.numpy(), moments.covariance_FF.numpy()
    text = np.array(json.dumps(about))
    arrays = {"about": text, "mean": mean_F, "covariance": covariance_FF}
    if spatial is not None:
        arrays["mean_spatial"] = spatial.mean_F.numpy()
        arrays["covariance_spatial"] = spatial.covariance_FF.numpy()
    atomic_write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_moments(path: Path, spatial: bool = False) -> Moments:
    """Read reference statistics: ours, those of ADM's evaluation suite, or those of clean-fid.

    Args:
        path: an ``.npz`` file.
        spatial: those of the spatial features, for sFID, that lie beside the others.

    Returns:
        The moments. Files of others do not say what they were taken of.

    Raises:
        UserError: if the file is missing, damaged, or holds something else.
    """
    chosen = ("shoestring-spatial", "adm-spatial") if spatial else ("shoestring", "adm")
    layouts = {name: LAYOUTS[name] for name in chosen}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = next((names for names in layouts.values() if set(names) <= set(file.files)), None)
            if names is None:
                pairs = " or ".join(" and ".join(pair) for pair in layouts.values())
                raise UserError(f"{path} holds {', '.join(file.files) or 'nothing'}; it needs {pairs}")
            mean_F, covariance_FF = (np.asarray(file[name], dtype=np.float64) for name in names)
            about: dict[str, Any] = json.loads(str(file["about"])) if "about" in file.files else {}
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; make reference statistics with shoestring eval stats"
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is no .npz file of reference statistics, or damaged ({error})") from error
    if mean_F.ndim != 1 or covariance_FF.shape != (len(mean_F), len(mean_F)):
        raise UserError(
            f"{path} holds a mean of shape {mean_F.shape} and a covariance of shape {covariance_FF.shape}; "
            "they must be F and F x F"
        )
    if not (np.isfinite(mean_F).all() and np.isfinite(covariance_FF).all()):
        raise UserError(f"{path} holds NaN or infinity")
    return Moments(
        torch.from_numpy(mean_F),
        torch.from_numpy(covariance_FF),
        about.get("count"),
        MappingProxyType(about.get("made", {})),
    )


def read_reference_pictures(path: Path) -> UInt8[Tensor, "N 3 H W"]:
    """Pictures of a reference batch of ADM's evaluation suite, which lie beside their statistics.

    Args:
        path: an ``.npz`` file with the array ``arr_0``, uint8 ``N H W 3``.

    Returns:
        The pictures.

    Raises:
        UserError: if the file holds none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            pictures = np.asarray(file["arr_0"]) if "arr_0" in file.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz file of reference pictures, or damaged ({error})") from error
    if pictures is None:
        raise UserError(
            f"{path} holds no pictures (arr_0), only statistics; take a reference of pictures, or leave out "
            "metrics that compare picture by picture"
        )
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise UserError(
            f"{path}: arr_0 is {pictures.dtype} {pictures.shape}; pictures are uint8 N x H x W x 3"
        )
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def has_pictures(path: Path) -> bool:
    """Whether a file of reference statistics holds the pictures too."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "arr_0" in file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False


def finite_rows(values: ArrayLike | Tensor, name: str, least: int = 1) -> Float[Tensor, "N F"]:
    """Features as a float64 matrix on the CPU, checked.

    Args:
        values: a matrix, a row a sample.
        name: how an error calls it.
        least: rows it must have.

    Returns:
        The matrix.

    Raises:
        ValueError: if it is no matrix, has too few rows, or holds NaN or infinity.
    """
    if isinstance(values, Tensor):
        rows_NF = values.detach().to("cpu", torch.float64)
    else:
        rows_NF = torch.from_numpy(np.array(values, dtype=np.float64))
    if rows_NF.ndim != 2:
        raise ValueError(f"{name} have shape {tuple(rows_NF.shape)}; they must be a matrix, a row a sample")
    if len(rows_NF) < least:
        raise ValueError(f"{name} have {len(rows_NF)} rows; at least {least} samples are needed")
    bad = (~rows_NF.isfinite()).any(dim=1).sum().item()
    if bad:
        raise ValueError(f"{name} hold NaN or infinity in {bad} of {len(rows_NF)} rows")
    return rows_NF
