"""The named baseline of decode_speed.py: `transformers` in fp32 on the very weights that the GGUF file stands for.

Reads one JSON object from standard input (model: path of the GGUF file, threads, new_tokens, single: prompts decoded
one at a time, batches: lists of prompts of one length decoded together, long: prompts for TTFT) and prints one:
lists of tok/s (`single`, `batched`) and of seconds (`ttft`), and what was measured (`name`). A plain greedy loop
over the KV cache, without `generate` and its per-token bookkeeping: the kindest way to measure it. It ends with status
3 and a sentence when the model cannot be built here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

CANNOT = 3


def prefill(model: Any, prompts: list[list[int]]) -> tuple[Any, Any, float]:
    """The first new token of each prompt [batch, 1], the KV cache, and the seconds that took."""
    import torch

    start = time.perf_counter()
    out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    tokens = out.logits[:, -1].argmax(-1, keepdim=True)
    return tokens, out.past_key_values, time.perf_counter() - start


def decode_rate(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens per second over all prompts together, after the first token of each."""
    tokens, cache, _ = prefill(model, prompts)
    start = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
    return len(prompts) * (new_tokens - 1) / (time.perf_counter() - start)


def main() -> None:
    """Measure what standard input asks for."""
    asked = json.load(sys.stdin)
    try:
        import torch
        import transformers
        from support.llama_oracle import file_oracle

        model = file_oracle(Path(asked["model"]))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(CANNOT)
    torch.set_num_threads(asked["threads"])
    with torch.inference_mode():
        prefill(model, asked["long"][:1])
        result = {
            "name": f"transformers {transformers.__version__}, fp32",
            "ttft": [prefill(model, [prompt])[2] for prompt in asked["long"]],
            "single": [decode_rate(model, [prompt], asked["new_tokens"]) for prompt in asked["single"]],
            "batched": [decode_rate(model, batch, asked["new_tokens"]) for batch in asked["batches"]],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
