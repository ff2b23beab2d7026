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


def unpack(
    column: TextColumn, rows: pa.Table, order_B: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Embeddings back from the store.

    Args:
        column: how they are stored.
        rows: with the columns ``column.columns``.
        order_B: numbers of the rows wanted, which may repeat; ``None`` = each once.

    Returns:
        Float32 ``B S D``, where S is the longest stored caption wanted, and the mask of real tokens ``B S``;
        what was not stored is zero.

    Raises:
        ValueError: if the values do not have the bytes of their tokens.
    """
    order_B = np.arange(rows.num_rows) if order_B is None else order_B
    tokens, first = flat(rows[column.columns[0]], np.int8 if column.dtype == "int8" else np.float16)
    if (first % column.width).any():
        raise ValueError(f"embeddings {column.name} are no whole number of {column.width} values")
    values_TD, first = tokens.reshape(-1, column.width), first // column.width
    count_B = np.diff(first)[order_B]
    longest = int(count_B.max(initial=1))
    text_BSD = np.empty((len(order_B), longest, column.width), dtype=np.float32)
    scale_T1 = None
    if column.dtype == "int8":
        scales, scale_first = flat(rows[column.columns[1]], np.float16)
        if not np.array_equal(scale_first, first):
            raise ValueError(f"embeddings {column.name} have other numbers of tokens and of scales")
        scale_T1 = scales.astype(np.float32)[:, None]
    for b, (start, count) in enumerate(zip(first[order_B].tolist(), count_B.tolist(), strict=True)):
        if scale_T1 is None:
            text_BSD[b, :count] = values_TD[start : start + count]
        else:  # straight into place: the batch is the largest thing in the loader
            np.multiply(
                values_TD[start : start + count], scale_T1[start : start + count], text_BSD[b, :count]
            )
        text_BSD[b, count:] = 0
    true_B = rows[column.columns[-1]].to_numpy()[order_B]
    return text_BSD, np.arange(longest)[None] < true_B[:, None]


def flat(column: pa.ChunkedArray, dtype: type[np.generic]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The contents of a binary column, one after another.

    Args:
        column: values of whole numbers of items.
        dtype: of the items.

    Returns:
        All items, without a copy where the column is in one piece, and where each value begins; the last
        entry is where the last value ends.

    Raises:
        ValueError: if a value is no whole number of items.
    """
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    size = np.dtype(dtype).itemsize
    if pa.types.is_fixed_size_binary(array.type):
        at = (array.offset + np.arange(len(array) + 1)) * array.type.byte_width
    else:
        kind = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        offsets = array.buffers()[1]
        at = np.zeros(1, np.int64)
        if offsets is not None and len(array):
            at = np.frombuffer(offsets, kind)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    first = at - at[0]
    if (first % size).any():
        raise ValueError(f"values of {size} bytes each are cut in the middle")
    data = array.buffers()[-1]
    if data is None or not first[-1]:
        return np.zeros(0, dtype), first // size
    return np.frombuffer(data, dtype, count=int(first[-1]) // size, offset=int(at[0])), first // size
