"""What the log says of bytes that are no HTTP: a line, not a traceback, and few of them: any client can cause it."""

from __future__ import annotations

import logging
import time

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

LOG_SECONDS = 10.0

http_log = logging.getLogger("swarmd.http")
"""The logger of aiohttp's protocol."""


class _Briefly(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._held_back = 0
        self._logged = -LOG_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        """Let one line through in LOG_SECONDS, and none about a client that has left; the rest is left as it is."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ConnectionError):
            return False
        # The last: aiohttp quotes an Expect header that is no text in its answer, and answers 500 instead.
        if not isinstance(error, HttpProcessingError | web.RequestPayloadError | UnicodeEncodeError):
            return True
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS:
            self._held_back += 1
            return False
        what = " ".join(str(error).split())[:120]
        more = f"; {self._held_back} more like it were not logged" if self._held_back else ""
        record.msg, record.args = (
            "a client sent what is not HTTP (%s)%s",
            (what.encode("ascii", "replace").decode(), more),
        )
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        self._held_back, self._logged = 0, now
        return True


http_log.addFilter(_Briefly())
