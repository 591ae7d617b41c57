"""How the next token of a sequence is chosen: the wishes of one request, as they travel to the last stage."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request's sampling wishes; the values are already checked by the API.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. `seed` and the token's
    position decide the draw, so a request gives the same tokens however it is batched, split or replayed.
    `prompt_tokens` says how many of the sequence's tokens are prompt: the presence and frequency penalties (OpenAI's
    definition) count generated tokens only, the repetition penalty (Keskar et al. 2019, arXiv:1909.05858) counts all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int = 0
    prompt_tokens: int = 0
