"""What each wire type costs and loses: `python bench/wire_types.py [--model PATH] [--cut LAYER]`.

A model is computed in fp32 in two stages, and the hidden states between them go through each type. Prints, per type:
bytes per token; microseconds per token to encode and decode (one thread, a prompt's worth of rows, and one row); how
far the logits then are from those of f32 (the largest difference, as a share of their range; the mean KL divergence;
how often the most likely token is the same); and the link speed below which a prompt's states arrive sooner than as
f32, encoding and decoding included.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.stage_compute import Logits, Span, StageCompute
from swarmd.node.engine.wire import WIRE_DTYPES, Hidden, WireDtype, decode, encode, wire_bytes
from swarmd.node.models.catalog import DEFAULT_MODEL
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.front import ModelFront
from swarmd.node.models.store import ModelStore

ROUNDS = 15
TEXT = Path(__file__).resolve().parent.parent / "docs" / "design.md"
PROMPT = 256


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest round."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


@contextmanager
def one_sequence(stage: StageCompute) -> Iterator[int]:
    """An open sequence, freed in the end."""
    stage.open(1)
    yield 1
    stage.free(1)


def first_half(stage: StageCompute, tokens: list[int]) -> Hidden:
    """Hidden states of all tokens, fp32."""
    with one_sequence(stage) as seq:
        payload = stage.forward([Span(seq, 0, tokens)], None, "f32", ()).payload
        assert payload is not None
        return np.frombuffer(payload, np.float32).reshape(len(tokens), -1).copy()


def second_half(stage: StageCompute, tokens: list[int], hidden: Hidden) -> Logits:
    """Logits after all tokens, [tokens, vocab]."""
    with one_sequence(stage) as seq:
        output = stage.forward([Span(seq, 0, tokens)], np.ascontiguousarray(hidden), "f32", range(len(tokens)))
        assert output.logits is not None
        return output.logits.copy()


def divergence(exact: Logits, found: Logits) -> float:
    """Mean KL(exact || found) over the rows, in nats."""

    def log_shares(logits: Logits) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_shares(exact), log_shares(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def row(dtype: WireDtype, hidden: Hidden, exact: Logits, rest: Callable[[Hidden], Logits]) -> str:
    """One line of the table."""
    rows, columns = hidden.shape
    used, data = encode(hidden, dtype)
    found = rest(decode(data, used, rows, columns))
    many = fastest(lambda: decode(encode(hidden, dtype)[1], used, rows, columns)) / rows
    one = fastest(lambda: decode(encode(hidden[:1], dtype)[1], used, 1, columns))
    size, plain = wire_bytes(used, 1, columns), wire_bytes("f32", 1, columns)
    even = f"{(plain - size) * 8 / many / 1e9:.1f} Gb/s" if size < plain else "–"
    off = np.abs(found - exact).max() / (exact.max() - exact.min())
    same = (found.argmax(-1) == exact.argmax(-1)).mean()
    return (
        f"| {dtype} | {size} | {many * 1e6:.1f} / {one * 1e6:.0f} µs | {off:.2e} | {divergence(exact, found):.1e} "
        f"| {same:.1%} | {even} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--cut", type=int, default=0, help="first layer of the second stage; default: the middle")
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".cache" / "swarmd-tests" / "models")
    arguments = parser.parse_args()
    path = asyncio.run(ModelStore(arguments.data_dir).ensure(arguments.model, lambda progress: None)).path
    tokens = ModelFront.load(path).encode_text(TEXT.read_text())[:PROMPT]
    with open_checkpoint(path) as checkpoint:
        n_layers = checkpoint.spec.n_layers
        cut = arguments.cut or n_layers // 2
        parts = [
            load_compute(checkpoint, start, end, device="cpu", kernels="torch", threads=1, kv_tokens=2 * PROMPT)
            for start, end in ((0, cut), (cut, n_layers))
        ]
    hidden = first_half(parts[0], tokens)
    exact = second_half(parts[1], tokens, hidden)
    print(
        f"{path.name}, cut before layer {cut}, {len(tokens)} tokens; largest hidden value {np.abs(hidden).max():.0f}\n"
    )
    print("| type | bytes/token | encode + decode, of many / of one | max off | KL | same top token | sooner below |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in WIRE_DTYPES:
        print(row(dtype, hidden, exact, lambda states: second_half(parts[1], tokens, states)))


if __name__ == "__main__":
    main()
