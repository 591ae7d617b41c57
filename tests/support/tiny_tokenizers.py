"""Small GGUF tokenizer metadata, made up for tests: every byte is a token, and a few merges."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "Ã ©", "å ł", "ð Ł", "ðŁ ĺ")


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """A "gpt2" vocabulary: 3 control tokens (ids 0-2), 256 bytes, one token per merge, 2 user-defined
    tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*CONTROL, *alphabet, *merged, *USER_DEFINED]
    types = [3] * 3 + [1] * (len(tokens) - 5) + [4] * 2
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def sentencepiece_metadata(pieces: list[str], **changes: Any) -> dict[str, Any]:
    """A "llama" vocabulary: <unk> <s> </s>, 256 byte tokens, then `pieces`, each scored lower than the one
    before."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }
