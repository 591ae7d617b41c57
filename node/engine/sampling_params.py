"""How the next token of a sequence is chosen: the wishes of one request, as they travel to the last stage."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

LogitBias = Annotated[
    dict[Annotated[int, Meta(ge=0, le=2**31)], Annotated[float, Meta(ge=-1000, le=1000)]], Meta(max_length=1024)
]

MAX_SCHEMA = 64 << 10
"""Bytes of a JSON schema."""
NO_TOKEN = -1
"""What is drawn where the JSON schema leaves nothing, or is too complex to say."""
NOT_YET = -2
"""What is drawn while it is still being found out what a JSON schema leaves: the last token is to be sent again."""


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """One request's sampling wishes. The API has checked them; the bounds here are for what members send.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. `seed` and the token's
    position decide the draw, so a request gives the same tokens however it is batched, split or replayed.
    `prompt_tokens` says how many of the sequence's tokens are prompt: the presence and frequency penalties (OpenAI's
    definition) count generated tokens only, the repetition penalty (Keskar et al. 2019, arXiv:1909.05858) counts all.
    `json_schema`, if not empty, is a JSON schema as JSON that the generated tokens are held to.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    logit_bias: LogitBias = {}
    top_logprobs: Annotated[int, Meta(ge=0, le=64)] = 0
    prompt_tokens: Annotated[int, Meta(ge=0, le=2**31)] = 0
    json_schema: Annotated[str, Meta(max_length=MAX_SCHEMA)] = ""
