"""The sessions of everybody who has the page open: so many and no more, and none for longer than it is used."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from fewshot_seg.app.session import Session


class Sessions:
    """Sessions by the key of their page. From any thread.

    Args:
        create: makes a new one.
        capacity: at most so many; the one that was not used for longest is closed to make room.
        idle_seconds: after which an unused one is closed, by `sweep` or when the next page asks.
        clock: seconds, ever rising.
    """

    def __init__(
        self,
        create: Callable[[], Session],
        *,
        capacity: int,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._create, self._capacity, self._idle, self._clock = create, capacity, idle_seconds, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Session, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Session:
        """The session of a page: a new, empty one where there is none, or where it was put away."""
        with self._lock:
            session = self._kept[key][0] if key in self._kept else self._create()
            self._kept[key] = (session, self._clock())
            self._kept.move_to_end(key)
        self.sweep()
        return session

    def sweep(self) -> None:
        """Close those that were not used for too long, and those that are too many."""
        with self._lock:
            now, away = self._clock(), list[Session]()
            while self._kept and (
                len(self._kept) > self._capacity or now - next(iter(self._kept.values()))[1] > self._idle
            ):
                away.append(self._kept.popitem(last=False)[1][0])
        for one in away:
            one.close()

    def drop(self, key: str) -> None:
        """Free what a page that was closed had."""
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is not None:
            kept[0].close()

    def close(self) -> None:
        """Free all."""
        for key in list(self._kept):
            self.drop(key)
