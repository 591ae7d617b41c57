"""Choosing the next token from one row of logits.

Order: repetition, presence and frequency penalties; logit bias; temperature; top-k; top-p; min-p; one draw by
inverse CDF. (vLLM's and HF's order, where both agree.) The draw's uniform number is a function of (seed,
position) alone, so a request gives the same tokens however it is batched, split over stages or replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarmd.node.engine.sampling_params import SamplingParams

GUESSED_NUCLEUS = 1024
"""top-p first looks at so many of the likeliest tokens, and at all only if those do not reach p."""


@dataclass(frozen=True)
class Choice:
    """A chosen token with its log-probability, and the `top_logprobs` likeliest tokens as (id, log-
    probability).

    Log-probabilities are natural logarithms under the model's own distribution: before penalties, bias,
    temperature, filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choose(logits: torch.Tensor, params: SamplingParams, history: Sequence[int], position: int) -> Choice:
    """The token for `position` of a sequence whose tokens so far are `history`; logits are float32 [vocab].

    Raises ValueError when the logits are not finite numbers.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's outputs are not finite numbers; its file is damaged or its values overflow")
    adjusted = _biased(penalized(logits, params, history), params)
    if params.temperature == 0:
        token = int((adjusted == adjusted.max()).nonzero()[0])
    else:
        token = draw(filtered(adjusted, params), uniform(params.seed, position))
    logprobs = logits.double().log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if params.top_logprobs:
        values, ids = logprobs.topk(min(params.top_logprobs, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)


def penalized(logits: torch.Tensor, params: SamplingParams, history: Sequence[int]) -> torch.Tensor:
    """Logits with the three penalties applied; the input is left alone.

    Repetition (CTRL, arXiv:1909.05858): each token of the history has its logit divided by the penalty if
    positive, else multiplied. Presence and frequency (OpenAI): subtracted once per token, and once per
    occurrence, of the generated part.
    """
    generated = history[params.prompt_tokens :]
    if params.repetition_penalty != 1 and history:
        seen = torch.tensor(sorted(set(history)))
        old = logits[seen]
        logits = logits.clone()
        logits[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and generated:
        ids, counts = torch.tensor(generated).unique(return_counts=True)
        logits = logits.clone()
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities, float64 [vocab] summing to 1, after temperature, top-k, top-p and min-p; excluded tokens
    are 0.

    top-p keeps the smallest set of likeliest tokens whose probabilities reach p (Holtzman et al. 2019,
    arXiv:1904.09751); min-p keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082). Of equally likely tokens at the edge of a filter the lower ids are kept. At least one
    token is always left.
    """
    scaled = logits.double()
    # The likeliest token at 0 first: a tiny temperature then makes the others -inf instead of making infinities of all.
    probabilities = ((scaled - scaled.max()) / params.temperature).softmax(-1)
    if params.top_k <= 0 and params.top_p >= 1:
        return _min_p(probabilities, params.min_p)
    ordered, ids = _likeliest(probabilities, params)
    if params.top_k > 0:
        ordered = ordered[: params.top_k] / ordered[: params.top_k].sum()
    keep = len(ordered)
    if params.top_p < 1:
        reached = ordered.cumsum(-1) - ordered
        keep = max(1, int((reached < params.top_p).sum()))
    kept = torch.zeros_like(probabilities)
    kept[ids[:keep]] = ordered[:keep]
    return _min_p(kept / kept.sum(), params.min_p)


def draw(probabilities: torch.Tensor, u: float) -> int:
    """The first token, by id, at which the cumulative probability exceeds u of [0, 1)."""
    cumulative = probabilities.cumsum(-1)
    token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    # Rounding may leave u at or above the last step: then it is the last token that is possible at all.
    last = int(probabilities.nonzero()[-1])
    return min(token, last)


def uniform(seed: int, position: int) -> float:
    """A number of [0, 1) with 53 random bits, a function of (seed modulo 2**64, position) alone (BLAKE2b as a
    counter-based PRF).
    """
    message = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8, person=b"swarmd-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _biased(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    if not params.logit_bias:
        return logits
    logits = logits.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    return logits


def _likeliest(probabilities: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens, likeliest first and equals by id: (probabilities, ids), at least all that top-k and
    top-p can keep. Sorting only those takes a tenth of the time of sorting a vocabulary.
    """
    size = params.top_k if params.top_k > 0 else GUESSED_NUCLEUS
    ids = torch.arange(len(probabilities))
    if size < len(probabilities):
        edge = probabilities.topk(size).values[-1]
        candidates = (probabilities >= edge).nonzero().view(-1)
        if params.top_k > 0 or float(probabilities[candidates].sum()) >= params.top_p:
            ids = candidates
    ordered, order = probabilities[ids].sort(descending=True, stable=True)
    return ordered, ids[order]


def _min_p(probabilities: torch.Tensor, min_p: float) -> torch.Tensor:
    if min_p <= 0:
        return probabilities
    kept = torch.where(probabilities >= min_p * probabilities.max(), probabilities, 0.0)
    return kept / kept.sum()
