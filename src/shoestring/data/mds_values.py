"""The values of an MDS sample: bytes of each encoding to Python and back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from decimal import Decimal
from math import prod
from typing import Any

import numpy as np
from PIL import Image

SCALARS = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)) | {
    "float16",
    "float32",
    "float64",
}
TEXTS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "str_int": int,
    "str_float": float,
    "str_decimal": Decimal,
    "json": json.loads,
}
FILES = frozenset({"bytes", "jpeg", "png"})
ENCODINGS = ("int", "pil", "ndarray", *sorted(SCALARS), *TEXTS, *sorted(FILES))
# Arrays whose type or shape differs from sample to sample begin with them, in these codes.
ARRAY_DTYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32",
    34: "float32", 64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
PIL_MODES = frozenset({"1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"})


def size_of(encoding: str) -> int | None:
    """Bytes of a value.

    Args:
        encoding: as in the index, e.g. ``int32``, ``ndarray:float16:3,4``.

    Returns:
        Their number; ``None`` if it differs from value to value.

    Raises:
        KeyError: if the encoding is not known (ValueError, TypeError: not its parameters).
    """
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray":
        dtype, shape = _array(rest)
        return None if dtype is None or shape is None else prod(shape) * dtype.itemsize
    if kind == "int":
        return 8
    if kind in SCALARS:
        return np.dtype(kind).itemsize
    if kind in TEXTS or kind in FILES or kind == "pil":
        return None
    raise KeyError(encoding)


def _array(rest: str) -> tuple[np.dtype[Any] | None, tuple[int, ...] | None]:
    """The fixed type and shape of ``ndarray:TYPE:SHAPE``, where they are fixed."""
    if not rest:
        return None, None
    name, _, shape = rest.partition(":")
    if name not in ARRAY_DTYPES.values():
        raise KeyError(name)
    return np.dtype(name).newbyteorder("<"), tuple(map(int, shape.split(","))) if shape else None


def decode(encoding: str, data: bytes) -> Any:
    """A value from its bytes.

    Args:
        encoding: one that :func:`size_of` knows.
        data: as stored.

    Returns:
        Text, number, JSON as Python's own, an array, or a picture as the bytes of a file (PNG for raw
        pixels).

    Raises:
        ValueError: or the like, if the bytes are not such a value.
    """
    kind, _, rest = encoding.partition(":")
    if kind in FILES:
        return data
    if kind in TEXTS:
        return TEXTS[kind](data.decode())
    if kind == "pil":
        return _decode_pil(data)
    if kind == "ndarray":
        return _decode_array(data, *_array(rest))
    return np.frombuffer(data, np.dtype("int64" if kind == "int" else kind).newbyteorder("<"))[0].item()


def _decode_array(data: bytes, dtype: np.dtype[Any] | None, shape: tuple[int, ...] | None) -> Any:
    if dtype is None:
        dtype, data = np.dtype(ARRAY_DTYPES[data[0]]).newbyteorder("<"), data[1:]
    if shape is None:
        # One byte: the number of axes, and in its two lowest bits how many bytes each length has (1 to 8).
        axes, width = data[0] >> 2, 1 << (data[0] & 3)
        shape = tuple(np.frombuffer(data[1 : 1 + axes * width], f"<u{width}").tolist())
        data = data[1 + axes * width :]
    return np.frombuffer(data, dtype).reshape(shape)


def _decode_pil(data: bytes) -> bytes:
    """Raw pixels (width, height, length of the mode, mode, pixels) as a PNG file."""
    width, height, length = np.frombuffer(data[:12], "<u4").tolist()
    mode = data[12 : 12 + length].decode()
    if mode not in PIL_MODES:
        raise ValueError(f"pixels of mode {mode!r}")
    picture = Image.frombytes(mode, (width, height), data[12 + length :])
    file = io.BytesIO()
    (picture.convert("RGB") if mode == "CMYK" else picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def encode(encoding: str, value: Any) -> bytes:
    """The bytes of a value; see :func:`decode`.

    Args:
        encoding: not ``pil``.
        value: of that kind; pictures as the bytes of a file.

    Returns:
        As stored.
    """
    kind, _, rest = encoding.partition(":")
    if kind in FILES:
        return bytes(value)
    if kind in TEXTS:
        return (json.dumps(value) if kind == "json" else str(value)).encode()
    if kind == "ndarray":
        return _encode_array(value, *_array(rest))
    assert kind != "pil", "pictures are written as jpeg or png"
    return np.array(value, np.dtype("int64" if kind == "int" else kind).newbyteorder("<")).tobytes()


def _encode_array(array: Any, dtype: np.dtype[Any] | None, shape: tuple[int, ...] | None) -> bytes:
    assert dtype is None or array.dtype == dtype, (array.dtype, dtype)
    assert shape is None or array.shape == shape, (array.shape, shape)
    head = b""
    if dtype is None:
        head += bytes([next(code for code, name in ARRAY_DTYPES.items() if name == array.dtype.name)])
    if shape is None:
        code = next(code for code in range(4) if max(array.shape) < 1 << (8 << code))
        head += bytes([array.ndim << 2 | code]) + np.array(array.shape, f"<u{1 << code}").tobytes()
    return head + np.asarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
