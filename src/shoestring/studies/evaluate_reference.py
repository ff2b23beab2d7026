"""The real pictures that an evaluation compares with, and their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from shoestring.data.records import Splits
from shoestring.evaluation.crops import Crops
from shoestring.evaluation.digests import file_digest, pictures_digest
from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.extractor import Extractor, kept_outputs
from shoestring.evaluation.measures import Figure, Measure, TooFew
from shoestring.evaluation.moments import Moments, has_pictures, read_moments, read_reference_pictures
from shoestring.evaluation.protocol import Protocol
from shoestring.runtime import UserError

FLOORS = ("fid", "kid", "fdd", "kdd", "fdd-vitb14", "kdd-vitb14", "fd-efflite0", "kid-efflite0")
"""Metrics whose value for real pictures is said too."""
Pictures = Sequence[Tensor] | Tensor
"""uint8 ``3 H W`` each; a sequence may read them from files."""


class Reference:
    """Real pictures, or statistics of some.

    Args:
        protocol: which.
        splits: gives the pictures of the run.
        side: of the pictures that are drawn.
        folder: of features that were computed.
        facts: of the result; what was compared with is written there.
        console: where a person reads.
        crops: of super-resolution.
    """

    def __init__(
        self,
        protocol: Protocol,
        splits: Callable[[], Splits],
        side: int,
        folder: Path,
        facts: dict[str, Any],
        console: Console,
        crops: Crops | None = None,
    ) -> None:
        self.protocol, self.splits, self.side, self.folder = protocol, splits, side, folder
        self.facts, self.console, self.crops = facts, console, crops
        self._read: dict[Path, Tensor] = {}

    def features(self, extractor: Extractor, what: str, pictures: Pictures) -> tuple[Tensor, ...]:
        """Outputs of an extractor, kept in a file.

        Args:
            extractor: what looks.
            what: how people call the pictures.
            pictures: at least one.

        Returns:
            All outputs.
        """
        with self.console.status(f"Looking at {len(pictures):,} {what} pictures with {extractor.name}"):
            return kept_outputs(extractor, pictures, self.folder, what)

    def size(self, measure: Measure, extractor: Extractor) -> int | None:
        """How many real pictures a metric can look at one by one.

        Args:
            measure: of the metric.
            extractor: of the metric.

        Returns:
            ``None`` where only their moments are known.

        Raises:
            UserError: if the reference is missing or of another kind.
        """
        if self.protocol.reference != "file":
            return len(self.pictures)
        file = self._file(extractor)
        if measure.moments or not has_pictures(file):
            self._moments(file, measure, extractor)
            return None
        return len(self._pictures_of(file))

    def of(self, measure: Measure, extractor: Extractor) -> Tensor | Moments:
        """What a metric compares with.

        Args:
            measure: of the metric.
            extractor: of the metric.

        Returns:
            A row for each real picture, or their moments.

        Raises:
            UserError: if the reference is missing or of another kind.
        """
        if self.protocol.reference == "file":
            file = self._file(extractor)
            self.facts.setdefault("reference", {})[extractor.name] = file_digest(file)
            if not (measure.rows and has_pictures(file)):
                moments = self._moments(file, measure, extractor)
                for name, value in (("pictures", moments.count), ("side", moments.made.get("side"))):
                    if value is not None:
                        self.facts["reference"][f"{extractor.name}.{name}"] = value
                return moments
            return self.features(extractor, "reference", self._pictures_of(file))[measure.output]
        images: Pictures = self.pictures
        self.facts["reference"] = {
            "pictures": len(images),
            "digest": pictures_digest(images),
            "side": images[0].shape[-1],
        }
        return self.features(extractor, self.protocol.reference, images)[measure.output]

    def floor(self, name: str, extractor: Extractor, measure: Measure, count: int) -> dict[str, Figure]:
        """The distance of training pictures from held-out ones: what a perfect model would get.

        Args:
            name: of the metric.
            extractor: of the metric.
            measure: of the metric.
            count: at most so many training pictures.

        Returns:
            A figure, or none where the reference is not held out.
        """
        if self.protocol.reference != "held-out" or name not in FLOORS:
            return {}
        training = self.splits().train.images
        if len(training) < 2:
            return {}
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:count]
        self.facts["floor"] = {"pictures": len(order)}
        real = self.features(extractor, "training", training[order])[measure.output]
        held = self.features(extractor, "held-out", self.pictures)[measure.output]
        kernel = name.startswith(("kid", "kdd"))
        value = kernel_distance(real, held).mean if kernel else frechet_distance(real, held)
        return {f"{name.replace('-', '_')}_floor": Figure(value)}

    @cached_property
    def pictures(self) -> Pictures:
        """Of the run, training or held-out, or crops; a mistake if there are none, or too few."""
        if self.protocol.reference == "crops":
            assert self.crops is not None
            return self.crops
        if self.protocol.reference == "none":
            raise UserError(
                f"protocol {self.protocol.name}: its metrics compare with real pictures, reference is none"
            )
        found = self.splits().train if self.protocol.reference == "training" else self.splits().held_out
        if len(found) < 2:
            raise TooFew(
                f"protocol {self.protocol.name}: reference={self.protocol.reference} has {len(found)} "
                "pictures; at least 2 are needed (data.held_out keeps some out of training)"
            )
        return found.images

    # -- files ---------------------------------------------------------------------------------------------

    def _file(self, extractor: Extractor) -> Path:
        files = self.protocol.reference_files
        if extractor.name not in files:
            raise UserError(
                f"protocol {self.protocol.name}: reference_files has none of {extractor.name}, only of "
                f"{', '.join(files)}; make it with shoestring eval stats --extractor {extractor.name}"
            )
        return Path(files[extractor.name])

    def _pictures_of(self, file: Path) -> Tensor:
        if file not in self._read:
            self._read[file] = read_reference_pictures(file)
        return self._read[file]

    def _moments(self, file: Path, measure: Measure, extractor: Extractor) -> Moments:
        moments = read_moments(file, spatial=measure.output == 1)
        width, wanted = len(moments.mean_F), extractor.widths[measure.output]
        if width != wanted:
            raise UserError(
                f"{file} holds statistics of {width} features, and {extractor.name} gives {wanted}; they are "
                "of another extractor"
            )
        side = moments.made.get("side", "")
        if side.isdecimal() and int(side) != self.side:
            raise UserError(
                f"{file} is of pictures of {side} px, and the model draws {self.side} px; make statistics "
                f"with shoestring eval stats --side {self.side}"
            )
        made_by = moments.made.get("extractor")
        if made_by is not None and made_by != extractor.identity.digest:
            raise UserError(
                f"{file} was made with another extractor or resize than {extractor.name}, "
                f"{extractor.resize}; make it anew with shoestring eval stats"
            )
        return moments
