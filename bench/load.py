"""The one load generator of the lab: prompts of token ids through `/v1/completions`, and when each token came back.

Every server is asked for the same: a prompt of exactly N token ids, greedy, exactly M new tokens, streamed. Only the
way to say "do not end early, do not reuse what you computed before" differs, see `request_body`.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
from harness import inside

Dialect = Literal["swarmd", "llama", "transformers"]

REQUEST_SECONDS = 600.0


class LoadError(Exception):
    """A server did not answer what was asked for; the message says which and how."""


@dataclass(frozen=True)
class Server:
    """Where requests go: base URL, how it wants to be asked, the name of the model there, ids that end an answer.

    `namespace`: the network namespace in which the URL is reached.
    """

    url: str
    dialect: Dialect
    model: str
    ends: tuple[int, ...] = ()
    namespace: str | None = None


@dataclass(frozen=True)
class Trace:
    """One answer. Times are `time.perf_counter()` seconds of this process; `arrivals` are those of events with text."""

    sent: float
    arrivals: tuple[float, ...]
    tokens: int

    @property
    def ttft(self) -> float:
        """Seconds from sending the request to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one."""
        return (self.tokens - 1) / (self.arrivals[-1] - self.arrivals[0])


def whole_run_rate(traces: Sequence[Trace]) -> float:
    """Tokens per second of streams that ran together, from the first request sent to the last token come."""
    begin, end = min(t.sent for t in traces), max(t.arrivals[-1] for t in traces)
    return sum(t.tokens for t in traces) / (end - begin)


class PromptSource:
    """Prompts of random token ids that end no answer; the same ones for the same seed, never one twice in a run."""

    def __init__(self, vocabulary: int, ends: Sequence[int], seed: int = 512) -> None:
        self._draw = random.Random(seed)
        self._ids = [token for token in range(vocabulary) if token not in set(ends)]

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """`count` new prompts of `length` token ids each."""
        return [self._draw.choices(self._ids, k=length) for _ in range(count)]


def request_body(server: Server, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """The JSON of a request for exactly `new_tokens` greedy tokens, nothing reused from earlier requests."""
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if server.dialect == "llama":
        # ignore_eos is llama-server's own word for the same bias on the tokens that end an answer.
        return body | {"ignore_eos": True, "cache_prompt": False}
    return body | {"logit_bias": {str(token): -100 for token in server.ends}}


async def complete(
    session: aiohttp.ClientSession,
    server: Server,
    prompt: Sequence[int],
    new_tokens: int,
    on_event: Callable[[int], None] = lambda events: None,
) -> Trace:
    """Send one request and follow it to its end; `on_event` is told how many events with text have come.

    Raises LoadError when the server fails, or counts other tokens than were sent and asked for.
    """
    body = request_body(server, prompt, new_tokens)
    arrivals, usage, sent = [], None, time.perf_counter()
    try:
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise LoadError(f"{server.url} answered {answer.status}: {(await answer.text())[:500]}")
            async for arrived, event in _events(answer):
                if "error" in event:
                    raise LoadError(f"{server.url} failed in mid-stream: {event['error']}")
                if any(choice.get("text") for choice in event.get("choices", ())):
                    arrivals.append(arrived)
                    on_event(len(arrivals))
                usage = event.get("usage") or usage
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LoadError(f"{server.url}: {type(error).__name__}: {error}") from error
    counted = (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
    if counted != (len(prompt), new_tokens):
        raise LoadError(f"{server.url} counts {counted} tokens in and out where {(len(prompt), new_tokens)} were asked")
    if len(arrivals) < 2 <= new_tokens:
        raise LoadError(f"{server.url} sent {new_tokens} tokens as {len(arrivals)} events: there is nothing to measure")
    return Trace(sent, tuple(arrivals), new_tokens)


async def complete_together(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Trace]:
    """One request per prompt, all sent at once, each on a connection of its own. Raises LoadError."""
    async with open_session(server) as session:
        return list(await asyncio.gather(*(complete(session, server, prompt, new_tokens) for prompt in prompts)))


def open_session(server: Server) -> aiohttp.ClientSession:
    """A client with as many connections as it has requests, made in the server's network namespace."""

    def make_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = info
        return inside(server.namespace, lambda: socket.socket(family, kind, protocol))

    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=make_socket)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS))


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    async for line in response.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield time.perf_counter(), json.loads(line[6:])
