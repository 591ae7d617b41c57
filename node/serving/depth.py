"""How many steps to keep in flight, from what the steps before took. Pure: times are passed in."""

from __future__ import annotations

import math

from swarmd.node.serving.messages import StepTimes

# One more step in flight cuts the sequences into smaller shares, which costs every stage one more reading of its
# weights per round; a gap this small is cheaper.
_BEARABLE_GAP = 0.5
_WEIGHT = 1 / 16


def pipeline_depth(n_stages: int, round_in_stages: float) -> int:
    """The steps that fill a pipeline when one step's round, computing and links, takes `round_in_stages` times as long
    as its slowest stage.

    At least one for each stage. At most 2 * `n_stages` + 2: a longer line in front of the stages would only be waited
    in.
    """
    wanted = math.ceil(min(round_in_stages, 2.0 * n_stages + 2) - _BEARABLE_GAP)
    return min(max(wanted, n_stages), 2 * n_stages + 2)


class DepthMeter:
    """Follows the steps of one pipeline; `depth` is the number to have in flight."""

    def __init__(self, n_stages: int) -> None:
        self.depth = n_stages
        self._n_stages = n_stages
        self._rounds = float(n_stages)

    def observe(self, times: StepTimes, round_trip_us: float) -> None:
        """A step came back after `round_trip_us`; what was neither computing nor waiting was on links."""
        if times.slowest_us <= 0:
            return
        link_us = max(0.0, round_trip_us - times.compute_us - times.wait_us)
        # A step held up by something else, such as a machine's other work, says little: it counts within bounds.
        rounds = min((times.compute_us + link_us) / times.slowest_us, 2.0 * self._n_stages + 2)
        self._rounds += _WEIGHT * (rounds - self._rounds)
        self.depth = pipeline_depth(self._n_stages, self._rounds)
