"""`transformers` behind the little of `/v1/completions` that the load generator asks for: a baseline, not a server.

python bench/transformers_server.py MODEL.gguf [--port N] [--threads N]

It computes in fp32 on the very weights that the GGUF file stands for, in a plain greedy loop over the KV cache, without
`generate` and its bookkeeping. Requests of one length that come together are prefilled and decoded as one batch, each
batch to its end: the kindest way to measure it with equal requests. Prompts are lists of token ids; `text` is a
placeholder, one per token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from harness import file_oracle

# Requests that were sent at once arrive within less.
GATHER_SECONDS = 0.02


@dataclass
class Request:
    """A prompt, the ids that must not come, and where its tokens go; None ends it."""

    prompt: list[int]
    new_tokens: int
    banned: list[int]
    tokens: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)


class Batcher:
    """Collects requests into batches and computes these one after the other, on a thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._waiting: asyncio.Queue[Request] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)

    async def submit(self, request: Request) -> None:
        """Have a request answered."""
        await self._waiting.put(request)

    async def run(self) -> None:
        """Compute for ever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(GATHER_SECONDS)
            shape = (len(batch[0].prompt), batch[0].new_tokens)
            for _ in range(self._waiting.qsize()):
                request = self._waiting.get_nowait()
                if (len(request.prompt), request.new_tokens) == shape:
                    batch.append(request)
                else:
                    self._waiting.put_nowait(request)

            def deliver(tokens: list[int], batch: list[Request] = batch) -> None:
                for request, token in zip(batch, tokens, strict=True):
                    loop.call_soon_threadsafe(request.tokens.put_nowait, token)

            await loop.run_in_executor(self._thread, generate, self._model, batch, deliver)
            for request in batch:
                request.tokens.put_nowait(None)


def generate(model: Any, batch: list[Request], deliver: Callable[[list[int]], None]) -> None:
    """Decode requests of one shape greedily and together; `deliver` gets one token of each after every step."""
    import torch

    cache, tokens = None, torch.tensor([request.prompt for request in batch])
    with torch.inference_mode():
        for _ in range(batch[0].new_tokens):
            out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = out.logits[:, -1], out.past_key_values
            for row, request in enumerate(batch):
                logits[row, request.banned] = float("-inf")
            tokens = logits.argmax(-1, keepdim=True)
            deliver(tokens[:, 0].tolist())


async def complete(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`, streamed."""
    asked = await request.json()
    banned = [int(token) for token in asked.get("logit_bias", {})]
    work = Request(asked["prompt"], asked["max_tokens"], banned)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await request.app[BATCHER].submit(work)
    while await work.tokens.get() is not None:
        await response.write(b'data: {"choices": [{"text": "."}]}\n\n')
    usage = {"prompt_tokens": len(work.prompt), "completion_tokens": work.new_tokens}
    await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
    return response


async def health(_: web.Request) -> web.Response:
    """`GET /health`: the model is loaded."""
    return web.Response(text="ok")


BATCHER: web.AppKey[Batcher] = web.AppKey("batcher", Batcher)


def main() -> None:
    """Load the model and serve it on loopback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    app = web.Application()
    app[BATCHER] = Batcher(file_oracle(options.model))

    async def start(app: web.Application) -> None:
        app[RUNNING] = asyncio.create_task(app[BATCHER].run())

    app.on_startup.append(start)
    app.add_routes([web.post("/v1/completions", complete), web.get("/health", health)])
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


RUNNING: web.AppKey[asyncio.Task[None]] = web.AppKey("running", asyncio.Task)


if __name__ == "__main__":
    main()
