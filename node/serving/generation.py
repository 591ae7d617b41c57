"""The internal token stream: what every HTTP dialect is an adapter of, and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from swarmd.node.engine.sampling_params import SamplingParams


class GenerationError(Exception):
    """A request that cannot be answered, or an answer that cannot go on. `message` is for the user.

    Codes: `model_not_found`, `invalid_request` (with `param`), `context_length_exceeded`, `overloaded`,
    `model_loading`, `not_enough_memory`, `node_lost`, `node_leaving`, `deadline`, `engine_error`. An `overloaded` swarm
    takes no more for the moment; if it is `unavailable`, it took the request and could not serve it, or this node
    takes no more.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        unavailable: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.unavailable = unavailable


@dataclass(frozen=True)
class GenerationRequest:
    """One generation: a chat (`messages`) or a text or token prompt, and how to continue it.

    `max_tokens` None means up to the context's end. `sampling.prompt_tokens` is filled in by the gateway.
    """

    model: str
    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    messages: tuple[dict[str, object], ...] | None = None
    prompt: str | tuple[int, ...] | None = None


class PieceToken(Struct, frozen=True):
    """One token behind a piece of text, with the most likely alternatives (text, log-probability) if asked for."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Piece(Struct, frozen=True):
    """Text to show now, and the tokens that arrived since the last piece. Either may be empty."""

    text: str
    tokens: tuple[PieceToken, ...] = ()


class Ending(Struct, frozen=True):
    """The last item of a generation: why it ended, and what it cost."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
