"""Prepares the next batches in threads while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Prefetcher(Generic[Key, Result]):
    """``get(key)`` returns ``make(key)``, and starts to make the next ones in threads.

    Threads and not processes: Lance must not be forked, and nothing is left behind in shared memory when a
    run is killed.

    Args:
        make: of a key; runs in several threads at once.
        following: the key that will probably be asked for after one.
        ahead: how many to prepare beyond the one asked for.
        threads: how many at once.
    """

    def __init__(
        self, make: Callable[[Key], Result], following: Callable[[Key], Key], ahead: int = 3, threads: int = 3
    ) -> None:
        self._make, self._following, self._ahead = make, following, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._waiting: dict[Key, Future[Result]] = {}

    def get(self, key: Key) -> Result:
        """The result for a key.

        Args:
            key: usually the one after the last; another costs what was prepared in vain.

        Returns:
            ``make(key)``.
        """
        wanted = [key]
        for _ in range(self._ahead):
            wanted.append(self._following(wanted[-1]))
        for stale in self._waiting.keys() - set(wanted):
            self._waiting.pop(stale).cancel()
        for each in wanted:
            if each not in self._waiting:
                self._waiting[each] = self._pool.submit(self._make, each)
        result = self._waiting[key].result()
        del self._waiting[key]  # only now: whoever was interrupted while waiting may ask again
        return result

    def close(self) -> None:
        """Stop; what is being made is finished and thrown away."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
