"""Choosing the next token from one row of logits.

Order: repetition, presence and frequency penalties; logit bias; what a schema allows; temperature; top-k; top-p; min-p;
one draw by inverse CDF. (vLLM's and HF's order, where both agree.) The draw's uniform number is a function of (seed,
position) alone, so a request gives the same tokens however it is batched, split over stages, replayed or speculated on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.stage_compute import Logits, RowSummary

Probabilities = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

GUESSED_NUCLEUS = 1024
"""top-p first looks at so many of the likeliest tokens, and at all only if those do not reach p."""


@dataclass(frozen=True)
class Choice:
    """A chosen token with its log-probability, and the `top_logprobs` likeliest tokens as (id, log-probability).

    Log-probabilities are natural logarithms under the model's own distribution: before penalties, bias, temperature,
    filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choose(
    logits: Logits,
    summary: RowSummary,
    params: SamplingParams,
    history: Callable[[], Sequence[int]],
    position: int,
    allowed: Mask | None = None,
) -> Choice:
    """The token for `position` of a sequence; logits are float32 [vocab], `summary` is theirs.

    `history` gives the sequence's tokens so far; it is called only if a penalty asks for them. Only `allowed` tokens
    are chosen, bool, by default all; at least one must be. Raises ValueError when the logits are not finite numbers.
    """
    if not summary.finite:
        raise ValueError("the model's outputs are not finite numbers; its file is damaged or its values overflow")
    adjusted = _biased(penalized(logits, params, history), params)
    if allowed is not None:
        adjusted = _only(allowed, adjusted)
    if params.temperature > 0:
        token = draw(filtered(adjusted, params), uniform(params.seed, position))
    elif adjusted is logits:
        token = summary.best
    else:
        token = int(adjusted.argmax())
    top = _likeliest_logprobs(logits, summary, params.top_logprobs)
    return Choice(token, float(logits[token]) - summary.log_normalizer, top)


def penalized(logits: Logits, params: SamplingParams, history: Callable[[], Sequence[int]]) -> Logits:
    """Logits with the three penalties applied; the input is left alone, and is the result when there are none.

    Repetition (CTRL, arXiv:1909.05858): each token of the history has its logit divided by the penalty if positive,
    else multiplied. Presence and frequency (OpenAI): subtracted once per token, and once per occurrence, of the
    generated part.
    """
    repetition = params.repetition_penalty != 1
    if not (repetition or params.presence_penalty or params.frequency_penalty):
        return logits
    tokens = np.array(history(), np.int64)
    logits = logits.copy()
    if repetition:
        seen = np.unique(tokens)
        old = logits[seen]
        logits[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    ids, counts = np.unique(tokens[params.prompt_tokens :], return_counts=True)
    logits[ids] -= (params.presence_penalty * (counts > 0) + params.frequency_penalty * counts).astype(np.float32)
    return logits


def filtered(logits: Logits, params: SamplingParams) -> Probabilities:
    """Probabilities, float64 [vocab] summing to 1, after temperature, top-k, top-p and min-p; excluded tokens are 0.

    top-p keeps the smallest set of likeliest tokens whose probabilities reach p (Holtzman et al. 2019,
    arXiv:1904.09751); min-p keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082). Of equally likely tokens at the edge of a filter the lower ids are kept. At least one token is
    always left.
    """
    scaled = logits.astype(np.float64)
    # The likeliest token at 0 first: a tiny temperature then makes the others -inf instead of making infinities of all.
    scaled -= scaled.max()
    with np.errstate(over="ignore"):
        scaled /= params.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if params.top_k <= 0 and params.top_p >= 1:
        return _min_p(probabilities, params.min_p)
    ordered, ids = _likeliest(probabilities, params)
    if params.top_k > 0:
        ordered = ordered[: params.top_k] / ordered[: params.top_k].sum()
    keep = len(ordered)
    if params.top_p < 1:
        reached = ordered.cumsum() - ordered
        keep = max(1, int((reached < params.top_p).sum()))
    kept = np.zeros_like(probabilities)
    kept[ids[:keep]] = ordered[:keep]
    return _min_p(kept / kept.sum(), params.min_p)


def draw(probabilities: Probabilities, u: float) -> int:
    """The first token, by id, at which the cumulative probability exceeds u of [0, 1)."""
    cumulative = probabilities.cumsum()
    token = int(cumulative.searchsorted(u * cumulative[-1], side="right"))
    # Rounding may leave u at or above the last step: then it is the last token that is possible at all.
    return min(token, int(probabilities.nonzero()[0][-1]))


def uniform(seed: int, position: int) -> float:
    """A number of [0, 1) with 53 random bits, a function of (seed modulo 2**64, position) alone (BLAKE2b as a
    counter-based PRF).
    """
    message = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8, person=b"swarmd-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _biased(logits: Logits, params: SamplingParams) -> Logits:
    if not params.logit_bias:
        return logits
    logits = logits.copy()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    return logits


def _only(allowed: Mask, logits: Logits) -> Logits:
    """All other logits minus infinity; there may be more of them than tokens."""
    count = min(len(allowed), len(logits))
    left = np.full_like(logits, -np.inf)
    np.copyto(left[:count], logits[:count], where=allowed[:count])
    return left


def _likeliest(probabilities: Probabilities, params: SamplingParams) -> tuple[Probabilities, np.ndarray]:
    """The likeliest tokens, likeliest first and equals by id: (probabilities, ids), at least all that top-k and top-p
    can keep. Sorting only those takes a tenth of the time of sorting a vocabulary.
    """
    size = params.top_k if params.top_k > 0 else GUESSED_NUCLEUS
    ids = np.arange(len(probabilities))
    if size < len(probabilities):
        edge = np.partition(probabilities, -size)[-size]
        candidates = (probabilities >= edge).nonzero()[0]
        if params.top_k > 0 or probabilities[candidates].sum() >= params.top_p:
            ids = candidates
    order = np.argsort(-probabilities[ids], kind="stable")
    return probabilities[ids[order]], ids[order]


def _likeliest_logprobs(logits: Logits, summary: RowSummary, count: int) -> tuple[tuple[int, float], ...]:
    count = min(count, len(logits))
    if count == 0:
        return ()
    ids = np.argpartition(logits, -count)[-count:]
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return tuple((int(token), float(logits[token]) - summary.log_normalizer) for token in ids)


def _min_p(probabilities: Probabilities, min_p: float) -> Probabilities:
    if min_p <= 0:
        return probabilities
    kept = np.where(probabilities >= min_p * probabilities.max(), probabilities, 0.0)
    return kept / kept.sum()
