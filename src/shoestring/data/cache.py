"""Blocks of a remote store kept on the local disk, as many as there is room for."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shoestring.data.tables import cannot_write

PART = ".part"
"""Ends the names of files that are being written."""
HOUR = 3600


class BlockCache:
    """Reads rows of tables by whole blocks, which are kept as Arrow files and dropped oldest first.

    Only blocks that this object fetched are counted and dropped, so a folder must not be shared by two at
    once; what an earlier run left there under the same names is used again.

    Args:
        folder: local; made if needed.
        limit_bytes: what the files may take together; the newest block is kept even if it is larger.
        block: rows.
    """

    def __init__(self, folder: Path, limit_bytes: int, block: int = 1024) -> None:
        self.folder, self.limit_bytes, self.block = folder, limit_bytes, block
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()
        self._fetching: dict[Path, threading.Lock] = {}
        self.fetched = 0
        """Blocks read from the stores so far."""
        for path in folder.glob(f"*{PART}"):  # of a run that was killed, if nobody writes it
            if time.time() - path.stat().st_mtime > HOUR:
                path.unlink(missing_ok=True)
        for path in sorted(folder.glob("*.arrow"), key=lambda p: p.stat().st_mtime):
            self._sizes[path] = path.stat().st_size

    def take(self, table: Any, rows: NDArray[np.int64], columns: Sequence[str], of: str) -> pa.Table:
        """Rows of a table.

        Args:
            table: a ``lance.LanceDataset``, at the version that is wanted.
            rows: numbers of rows, ascending.
            columns: names.
            of: digest of the store: another one may have been made at the same address.

        Returns:
            One row each.

        Raises:
            UserError: if the cache cannot be written.
        """
        blocks, starts = np.unique(rows // self.block, return_index=True)
        parts = []
        for number, part in zip(blocks.tolist(), np.split(rows, starts[1:]), strict=True):
            whole = self._block(table, number, columns, of)
            parts.append(whole.take(pa.array(part - number * self.block)))
        if not parts:
            return table.schema.empty_table().select(list(columns))
        return pa.concat_tables(parts)

    def _block(self, table: Any, number: int, columns: Sequence[str], of: str) -> pa.Table:
        name = f"{of}\n{table.uri}\n{table.version}\n{number}\n{self.block}\n{sorted(columns)}"
        path = self.folder / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.arrow"
        with self._lock:
            mine = self._fetching.setdefault(path, threading.Lock())
        with mine:  # two threads that want one block fetch it once
            try:
                found = self._open(path)
            except (OSError, pa.ArrowInvalid):
                found = self._fetch(table, number, columns, path)
        return found

    def _open(self, path: Path) -> pa.Table:
        with pa.memory_map(str(path)) as file:  # pages stay mapped for as long as the table lives
            found = pa.ipc.open_file(file).read_all()
        with self._lock:
            if path in self._sizes:
                self._sizes.move_to_end(path)
        return found

    def _fetch(self, table: Any, number: int, columns: Sequence[str], path: Path) -> pa.Table:
        first = number * self.block
        count = min(self.block, table.count_rows() - first)
        whole = table.to_table(columns=list(columns), offset=first, limit=count)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=PART)
            with os.fdopen(handle, "wb") as file, pa.ipc.new_file(file, whole.schema) as writer:
                writer.write_table(whole)
            size = Path(temporary).stat().st_size  # another thread may drop the block once it is there
            Path(temporary).replace(path)
        except OSError as error:
            raise cannot_write(str(self.folder), error) from error
        with self._lock:
            self.fetched += 1
            self._sizes[path] = size
            self._sizes.move_to_end(path)
            while len(self._sizes) > 1 and sum(self._sizes.values()) > self.limit_bytes:
                oldest, _ = self._sizes.popitem(last=False)
                oldest.unlink(missing_ok=True)
                self._fetching.pop(oldest, None)
        return whole
