"""A limit on log lines that strangers can cause. Pure: the caller passes the time."""

from __future__ import annotations


class LogLimit:
    """Admits one line per key and interval, and counts what it held back. Its memory is bounded.

    At most `capacity` keys are kept; while all of them are fresh, further keys share one line.
    """

    _OTHERS = "others"

    def __init__(self, interval: float = 10.0, capacity: int = 256):
        self._interval = interval
        self._capacity = capacity
        self._keys: dict[str, tuple[float, int]] = {}  # time of the last line, lines held back since

    def admit(self, key: str, now: float) -> int | None:
        """None if this line is to be held back, else how many like it were held back since the last one."""
        if key not in self._keys and len(self._keys) >= self._capacity:
            self._forget(now)
            if len(self._keys) >= self._capacity:
                key = self._OTHERS
        last, held = self._keys.get(key, (now - self._interval, 0))
        if now - last < self._interval:
            self._keys[key] = (last, held + 1)
            return None
        self._keys[key] = (now, 0)
        return held

    def _forget(self, now: float) -> None:
        self._keys = {key: value for key, value in self._keys.items() if now - value[0] < self._interval}
