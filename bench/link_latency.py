"""Measure a link between two processes on loopback: small round trips and large one-way payloads.

python bench/link_latency.py [--rounds N]

Prints one table: round trip of a request with an 8 KiB payload each way, of a bare message, an item of a
stream, and the time from sending a payload to having all of it on the other side (a request answered without
payload, less half a bare round trip). Everything is encrypted and authenticated, exactly as between nodes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import ssl
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import issue_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, Vocabulary
from swarmd.transport.token import JoinToken


class Ping(Struct, frozen=True, tag="ping"):
    """A request; `echo` asks for the payload back."""

    echo: bool = False
    items: int = 0


VOCABULARY = Vocabulary((Ping,))


class Echo:
    """The handler of both sides."""

    async def on_link(self, link: Link) -> None:
        """Nothing to prepare."""

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """One-way messages are not measured."""

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Any:
        """The payload back, or nothing."""
        assert isinstance(message, Ping)
        return Ping(), payload if message.echo else b""

    async def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """As many items as asked for, as fast as the window allows."""
        assert isinstance(message, Ping)
        for _ in range(message.items):
            yield Ping()

    async def on_closed(self, link: Link, reason: str) -> None:
        """Nothing to tidy."""


def make_endpoint(token: JoinToken, name: str) -> Endpoint:
    """An endpoint with a key of its own."""
    hello = Hello(PROTOCOL_VERSION, "probe", name, "bench")
    credentials = issue_credentials(Ed25519PrivateKey.generate(), token)
    return Endpoint(credentials, VOCABULARY, Echo(), hello=lambda: hello)


async def serve(token_text: str) -> None:
    """The other process: listen until standard input ends."""
    endpoint = make_endpoint(JoinToken.parse(token_text), "far")
    print(await endpoint.listen("127.0.0.1", 0), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await endpoint.close()


async def timed(count: int, work: Callable[[], Awaitable[object]]) -> list[float]:
    """Seconds of each of `count` rounds, after a tenth as many to warm up."""
    for _ in range(max(count // 10, 2)):
        await work()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await work()
        times.append(time.perf_counter() - start)
    return times


async def measure(rounds: int) -> None:
    """Start the other process, measure, print."""
    token = JoinToken.generate()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--serve",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "SWARMD_BENCH_TOKEN": str(token)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    endpoint = make_endpoint(token, "near")
    link = await endpoint.dial("127.0.0.1", port)
    small, large = bytes(8 * 1024), os.urandom(4 << 20)

    async def stream() -> None:
        async with link.stream(Ping(items=1000)) as items:
            async for _ in items:
                pass

    bare = await timed(rounds, lambda: link.request(Ping()))
    echo = await timed(rounds, lambda: link.request(Ping(echo=True), small))
    bulk = await timed(max(rounds // 20, 20), lambda: link.request(Ping(), large))
    streams = await timed(max(rounds // 100, 5), stream)
    half = statistics.median(bare) / 2
    rows = [
        ("bare round trip", [t * 1e6 for t in bare], "us"),
        ("8 KiB round trip", [t * 1e6 for t in echo], "us"),
        ("4 MiB one way", [(t - half) * 1e3 for t in bulk], "ms"),
        ("one stream item", [t * 1e3 for t in streams], "us"),
    ]
    print(describe_machine())
    print(f"{'':18}{'p50':>10}{'p95':>10}{'p99':>10}")
    for label, values, unit in rows:
        values.sort()
        cells = (values[min(int(len(values) * q), len(values) - 1)] for q in (0.5, 0.95, 0.99))
        print(f"{label:18}" + "".join(f"{cell:>10.2f}" for cell in cells) + f"  {unit}")
    await endpoint.close()
    process.stdin.close()
    await process.wait()


def describe_machine() -> str:
    """One line: processor, cores, system, Python, OpenSSL, and how busy it was."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    load = psutil.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, load {load:.1f}"
    )


def main() -> None:
    """Parse the command line and run one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3000, help="round trips to measure (default 3000)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asyncio.run(serve(os.environ["SWARMD_BENCH_TOKEN"]) if options.serve else measure(options.rounds))


if __name__ == "__main__":
    main()
