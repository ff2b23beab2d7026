"""Caption embeddings on disk: the stored positions of a caption, by default int8 with a scale each.

A position's values are divided by a scale so that the largest becomes 127: at 1,024 normally distributed
values that keeps its direction within a cosine of 0.9999.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.manifest import TextColumn
from shoestring.tensors import Bool, Float


def pack(column: TextColumn, text_BSD: Float[Tensor, "B S D"], mask_BS: Bool[Tensor, "B S"]) -> pa.Table:
    """Embeddings of some captions as rows of the store.

    Args:
        column: how they are stored.
        text_BSD: as an encoder gives them.
        mask_BS: true at real tokens, which come first.

    Returns:
        The columns ``column.columns``, a row each caption.
    """
    true_B = mask_BS.sum(1).to(torch.int32).numpy()
    stored_B = true_B if column.positions == "true" else np.full(len(true_B), text_BSD.shape[1])
    values = text_BSD.float().numpy()
    tokens: list[bytes] = []
    scales: list[bytes] = []
    for row_SD, count in zip(values, stored_B, strict=True):
        if column.dtype == "float16":
            tokens.append(row_SD[:count].astype(np.float16).tobytes())
            continue
        ints_SD, scale_S = quantise(row_SD[:count])
        tokens.append(ints_SD.tobytes())
        scales.append(scale_S.tobytes())
    arrays = [pa.array(tokens, pa.binary()), pa.array(true_B, pa.int32())]
    if column.dtype == "int8":
        arrays.insert(1, pa.array(scales, pa.binary()))
    return pa.table(arrays, names=column.columns)


def quantise(values_SD: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Int8 and one float16 scale a row, such that ``ints * scale`` is near the values.

    Args:
        values_SD: a row each position.

    Returns:
        Integers from -127 to 127 and the scales; a row of zeros has scale 0.
    """
    # Rounded first, so that the integers belong to the scale that is stored; never to zero or infinity.
    largest_S = np.abs(values_SD).max(axis=1, initial=0.0) / 127
    tiny, huge = np.finfo(np.float16).smallest_subnormal, np.finfo(np.float16).max
    scale_S = np.where(largest_S > 0, np.clip(largest_S, tiny, huge), 0).astype(np.float16)
    divisor_S = np.where(scale_S > 0, scale_S.astype(np.float32), 1.0)
    return np.clip(np.rint(values_SD / divisor_S[:, None]), -127, 127).astype(np.int8), scale_S


def unpack(column: TextColumn, rows: pa.Table) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Embeddings back from the store.

    Args:
        column: how they are stored.
        rows: with the columns ``column.columns``.

    Returns:
        Float32 ``B S D``, where S is the longest stored caption, and the mask of real tokens ``B S``; what
        was not stored is zero.
    """
    tokens = _buffers(rows[column.columns[0]])
    true_B = rows[column.columns[-1]].to_numpy()
    width = column.width * (1 if column.dtype == "int8" else 2)
    stored_B = np.array([len(row) // width for row in tokens], dtype=np.int64)
    longest = int(stored_B.max(initial=1))
    text_BSD = np.zeros((len(tokens), longest, column.width), dtype=np.float32)
    if column.dtype == "float16":
        for b, (row, count) in enumerate(zip(tokens, stored_B, strict=True)):
            text_BSD[b, :count] = np.frombuffer(row, np.float16).reshape(count, column.width)
    else:
        scales = _buffers(rows[column.columns[1]])
        for b, (row, scale, count) in enumerate(zip(tokens, scales, stored_B, strict=True)):
            ints_SD = np.frombuffer(row, np.int8).reshape(count, column.width)
            np.multiply(
                ints_SD, np.frombuffer(scale, np.float16).astype(np.float32)[:, None], text_BSD[b, :count]
            )
    return text_BSD, np.arange(longest)[None] < true_B[:, None]


def _buffers(column: pa.ChunkedArray) -> list[memoryview]:
    """Every value of a binary column, without copying."""
    views: list[memoryview] = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        at = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        whole = memoryview(data) if data is not None else memoryview(b"")
        views += [whole[a:b] for a, b in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)]
    return views
