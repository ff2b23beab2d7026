"""The results of the sampling-cost study: one Parquet file, a row a cell, and a CSV file to share."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from shoestring.runtime import UserError, atomic_write

NOT_A_NUMBER = float("nan")


@dataclass(frozen=True)
class Row:
    """One cell: a network, how it was sampled, and how good its pictures are."""

    model: str
    """Name of the size."""
    family: str
    seed: int
    """Of the training."""
    parameters: int
    nimg: int
    """Images seen in training."""
    training_gflops: float
    """Of all these images, forward and backward."""
    gflops: float
    """Of one network evaluation of one picture."""
    sampler: str
    steps: int
    guidance: float
    evaluations: int
    """Of one picture, guidance's second pass not counted."""
    samples: int
    kid: float
    kid_error: float
    """Standard error."""
    fd: float
    precision: float
    recall: float
    accuracy: float = NOT_A_NUMBER
    """Pictures of shapes that show what was asked for; only there."""
    psnr: float = NOT_A_NUMBER
    """Super-resolution: dB to the pictures that were made small, mean."""
    feature_distance: float = NOT_A_NUMBER
    """Super-resolution: 1 - cosine of features to those pictures, mean. Not LPIPS."""
    seconds: float = NOT_A_NUMBER
    """Of drawing, as it ran."""
    guided_calls: int = 2
    """Network calls of an evaluation with guidance; 1 of models that take the scale as an input."""
    digest: str = ""
    """Of the model file."""

    @property
    def cell(self) -> tuple[object, ...]:
        """What makes it the same measurement."""
        model = (self.model, self.seed, self.nimg, self.digest)
        return (*model, self.sampler, self.steps, self.guidance, self.samples)


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
_SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(Row)])
METRICS = {
    "kid": False,
    "fd": False,
    "precision": True,
    "recall": True,
    "accuracy": True,
    "psnr": True,
    "feature_distance": False,
}
"""Whether higher is better."""


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows as CSV, which version control can show.

    Args:
        path: the file, replaced.
        rows: of a results file.
    """
    atomic_write(path, lambda file: pyarrow.csv.write_csv(_table(rows), file))


def read_rows(path: Path) -> list[Row]:
    """Read the results of a study.

    Args:
        path: a Parquet file, or a CSV file as :func:`write_csv` makes it; may not exist.

    Returns:
        Its rows.

    Raises:
        UserError: if it is no such file.
    """
    if not path.exists():
        return []
    try:
        if path.suffix == ".csv":
            options = pyarrow.csv.ConvertOptions(column_types=_SCHEMA, null_values=[])
            table = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            table = pq.read_table(path)
        types = pa.schema([_SCHEMA.field(name) for name in table.column_names])
        rows = [Row(**record) for record in table.cast(types).to_pylist()]
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a results file of shoestring study sampling ({error}); give results.parquet of a "
            "study's folder, or delete it to begin anew"
        ) from error
    for name in table.column_names:
        if table[name].null_count:
            raise UserError(f"{path}: column {name} has cells without a value; every row needs one")
    for name in ("gflops", "evaluations", "samples"):
        least = min((getattr(row, name) for row in rows), default=1)
        if not least > 0:
            raise UserError(f"{path}: column {name} has {least:g}; it must be above 0 in every row")
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a row at once; processes wait for one another, and what was there is never half-written.

    Args:
        path: the file, made if needed.
        row: the row.

    Raises:
        UserError: if the file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*read_rows(path), row]
        atomic_write(path, lambda file: pq.write_table(_table(rows), file))
