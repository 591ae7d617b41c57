"""The loads that contenders are put under, each with what is measured by it. One call is one repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from figures import Metric, percentile
from load import PromptSource, Server, Trace, complete, complete_together, open_session, whole_run_rate

Run = Callable[[Server, PromptSource], Coroutine[Any, Any, dict[str, float]]]

TALKING_STREAMS = 4
TALKING_PROMPT, TALKING_TOKENS = 64, 384
# Events of each stream before the long prompt comes; the first of them are still under the prompts of the others.
QUIET_EVENTS, UNSETTLED_EVENTS = 48, 8


@dataclass(frozen=True)
class Load:
    """A load: its metrics, how to run it once, and what it needs of a server.

    `streams` that run at once, each of at most `length` tokens, prompt included.
    """

    metrics: tuple[Metric, ...]
    run: Run
    streams: int
    length: int


def single_stream(prompt: int = 512, new_tokens: int = 128, label: str = "") -> Load:
    """One request alone: decode speed and TTFT. `label` tells several such loads of one scenario apart."""
    suffix = f", {label}" if label else ", 1 stream"
    decode = Metric(f"decode{suffix}", "tok/s", higher_is_better=True, reads_weights=True)
    ttft = Metric(f"TTFT{suffix}", "s", higher_is_better=False)

    async def run(server: Server, source: PromptSource) -> dict[str, float]:
        [trace] = await complete_together(server, source.prompts(1, prompt), new_tokens)
        return {decode.name: trace.decode_rate, ttft.name: trace.ttft}

    return Load((decode, ttft), run, 1, prompt + new_tokens)


def many_streams(streams: int = 8, prompt: int = 512, new_tokens: int = 128) -> Load:
    """Requests sent at once: tokens of the whole run per second, and the TTFT that 99 % of them do not exceed."""
    rate = Metric(f"whole run, {streams} streams", "tok/s", higher_is_better=True)
    worst = Metric(f"p99 TTFT, {streams} streams", "s", higher_is_better=False)

    async def run(server: Server, source: PromptSource) -> dict[str, float]:
        traces = await complete_together(server, source.prompts(streams, prompt), new_tokens)
        return {rate.name: whole_run_rate(traces), worst.name: percentile([trace.ttft for trace in traces], 0.99)}

    return Load((rate, worst), run, streams, prompt + new_tokens)


def interference(prompt: int = 2048, new_tokens: int = 8) -> Load:
    """Gaps between the events of streams that are talking, before and while a long prompt is computed beside them."""

    when = [f"{state}, {share}" for state in ("alone", "beside the prompt") for share in ("p50", "p99")]
    metrics = (
        *(Metric(f"gap between tokens {moment}", "ms", higher_is_better=False) for moment in when),
        Metric(f"TTFT of the prompt of {prompt}", "s", higher_is_better=False),
    )

    async def run(server: Server, source: PromptSource) -> dict[str, float]:
        streams, long = await _talk_and_interrupt(server, source, prompt, new_tokens)
        quiet = gaps_between(streams, 0.0, long.sent, skip=UNSETTLED_EVENTS)
        busy = gaps_between(streams, long.sent, long.arrivals[0])
        shares = [percentile(gaps, share) * 1e3 for gaps in (quiet, busy) for share in (0.5, 0.99)]
        return dict(zip((metric.name for metric in metrics), [*shares, long.ttft], strict=True))

    return Load(metrics, run, TALKING_STREAMS + 1, prompt + new_tokens)


def gaps_between(streams: Sequence[Trace], begin: float, end: float, skip: int = 0) -> list[float]:
    """Seconds of the gaps of all streams that lie, if only in part, between two times.

    A stream that stands still all the time has one gap that contains it. The first `skip` gaps of each do not count.
    """
    return [
        later - earlier
        for stream in streams
        for earlier, later in list(zip(stream.arrivals, stream.arrivals[1:], strict=False))[skip:]
        if earlier < end and later > begin
    ]


async def _talk_and_interrupt(
    server: Server, source: PromptSource, prompt: int, new_tokens: int
) -> tuple[list[Trace], Trace]:
    """Traces of the streams that talk, and of the long prompt, sent when each of them has sent enough."""
    settled = [asyncio.Event() for _ in range(TALKING_STREAMS)]

    def watch(event: asyncio.Event) -> Callable[[int], None]:
        return lambda events: event.set() if events >= QUIET_EVENTS else None

    async with open_session(server) as session:
        talking = [
            asyncio.create_task(complete(session, server, text, TALKING_TOKENS, watch(event)))
            for text, event in zip(source.prompts(TALKING_STREAMS, TALKING_PROMPT), settled, strict=True)
        ]
        waiting = asyncio.gather(*(event.wait() for event in settled))
        try:
            # A stream that fails never settles.
            await asyncio.wait([waiting, *talking], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                await asyncio.gather(*talking)
            [long_prompt] = source.prompts(1, prompt)
            long = await complete(session, server, long_prompt, new_tokens)
            return list(await asyncio.gather(*talking)), long
        finally:
            for task in (waiting, *talking):
                task.cancel()
