"""How many tokens of a prompt go into one step, from what the steps before took. Pure: times are passed in."""

from __future__ import annotations

import math

LEAST_CHUNK = 16
CHUNKS_PER_STAGE = 4

# While others decode, a step with prefill may take so many times as long as one without, or so long at least.
STRETCH, PATIENCE_US = 2.0, 30_000.0

_CHUNK_WHEN_UNMEASURED = 32
_WEIGHT = 1 / 8
_OUTLIER = 4.0


class StepPace:
    """What steps take on the slowest stage, in microseconds, each an average over the latest ten or so.

    `decode_us` is a step that only decodes, `row_us` one more token of prefill; 0 until measured.
    """

    def __init__(self) -> None:
        self.decode_us = 0.0
        self.row_us = 0.0

    def observe(self, decode_rows: int, prefill_rows: int, slowest_us: float) -> None:
        """A step of so many tokens came back, on which the slowest stage had computed for `slowest_us`."""
        if slowest_us <= 0:
            return
        if decode_rows and not prefill_rows:
            self.decode_us = _averaged(self.decode_us, slowest_us)
        elif prefill_rows >= LEAST_CHUNK // 2:
            beside = self.decode_us if decode_rows else 0.0
            self.row_us = _averaged(self.row_us, max(slowest_us - beside, slowest_us / 4) / prefill_rows)


def chunk_tokens(prompt: int, n_stages: int, most: int, pace: StepPace, *, decoding: bool) -> int:
    """How many of a prompt's tokens, 1 to `most`, to put into one step; `decoding`: others wait for their next token.

    A prompt of T tokens in chunks of c passes n stages in (T/c + n - 1) * (f + c*r), f being a step's fixed time and r
    a row's: least at c = sqrt(T*f / (r*(n-1))). Where a step costs little beside its rows there are CHUNKS_PER_STAGE
    chunks for each stage, since smaller ones win nothing more.
    """
    chunk = most
    if n_stages > 1:
        chunk = max(LEAST_CHUNK, math.ceil(prompt / (CHUNKS_PER_STAGE * n_stages)))
        if pace.row_us:
            chunk = max(chunk, round(math.sqrt(prompt * pace.decode_us / (pace.row_us * (n_stages - 1)))))
    if decoding:
        chunk = min(chunk, _patient_chunk(pace))
    return max(1, min(chunk, most))


def _patient_chunk(pace: StepPace) -> int:
    if not pace.row_us:
        return _CHUNK_WHEN_UNMEASURED
    spare_us = max(STRETCH * pace.decode_us, PATIENCE_US) - pace.decode_us
    return max(LEAST_CHUNK, int(spare_us / pace.row_us))


def _averaged(average: float, value: float) -> float:
    if not average:
        return value
    return average + _WEIGHT * (min(value, _OUTLIER * average) - average)
