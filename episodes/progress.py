"""Progress bars with time left, by a clock that never goes back: the clock of the day can be set while a run lasts."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm as _tqdm


class tqdm(_tqdm):  # type: ignore[misc]  # noqa: N801 - used as tqdm's own
    """tqdm, but for its clock, which is `time.monotonic`: by `time.time` the time left can come out negative."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.disable:
            return
        self._time = time.monotonic
        self.last_print_t = self.start_t = self._time()
