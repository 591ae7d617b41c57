"""A stage's sequences as texts: their tokens, their wishes and, on the last stage, the choice of what comes next."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from swarmd.node.engine.constraint import Constraint, Constraints
from swarmd.node.engine.sampling import Mask, choose
from swarmd.node.engine.sampling_params import NO_TOKEN, NOT_YET, SamplingParams
from swarmd.node.engine.stage_compute import StageOutput, StepError
from swarmd.node.engine.step import Sample, StepChunk
from swarmd.node.models.errors import ModelFileError

log = logging.getLogger("swarmd.engine")

MOST_CONSTRAINTS = 64
"""As many as sequences that run at a time: those that only stay in the cache need none."""


class Sampler:
    """`vocab_size` is the number of logits. `constraints` are for the last stage, which alone chooses."""

    def __init__(self, vocab_size: int, constraints: Constraints | None) -> None:
        self._vocab_size = vocab_size
        self._constraints = constraints
        self._params: dict[int, SamplingParams] = {}
        self._tokens: dict[int, list[int]] = {}
        # Of who was sampled last. Any can be made anew from the schema and the tokens.
        self._held_to: OrderedDict[int, Constraint] = OrderedDict()

    @property
    def sequences(self) -> list[int]:
        """Those that are open."""
        return list(self._params)

    @property
    def held(self) -> tuple[int, int]:
        """(sequences, tokens of them all); may be asked from any thread."""
        tokens = list(self._tokens.values())
        return len(tokens), sum(map(len, tokens))

    def check(self, params: SamplingParams) -> None:
        """Raises StepError when the wishes name a token that the model does not have."""
        outside = [token for token in params.logit_bias if not 0 <= token < self._vocab_size]
        if outside:
            raise StepError(f"logit_bias names token {outside[0]}; the vocabulary has {self._vocab_size}")

    def open(self, seq: int, params: SamplingParams, tokens: Sequence[int]) -> None:
        """Begin with these tokens."""
        self._params[seq] = params
        self._tokens[seq] = list(tokens)

    def tokens(self, seq: int) -> Sequence[int]:
        """Those of a sequence so far."""
        return self._tokens[seq]

    def append(self, seq: int, tokens: Sequence[int]) -> None:
        """A step has computed these."""
        self._tokens[seq] += tokens

    def truncate(self, seq: int, length: int) -> None:
        """Forget all tokens from position `length` on."""
        del self._tokens[seq][length:]

    def free(self, seq: int) -> None:
        """Forget the sequence; unknown ids are let be."""
        self._params.pop(seq, None)
        self._tokens.pop(seq, None)
        self._held_to.pop(seq, None)

    def sample(self, chunks: Sequence[StepChunk], output: StageOutput) -> tuple[Sample, ...]:
        """Choose after the last `sample` tokens of each chunk, one position after the other, as long as what is drawn
        is the chunk's own next token. The chunks are not appended yet.

        Where a schema leaves nothing, or fails, it is NO_TOKEN, for that concerns nobody else in the step; while the
        model's tokens are being read for it, NOT_YET. Raises StepError when the logits are not finite.
        """
        samples: list[Sample] = []
        row = 0
        for chunk in chunks:
            first = len(chunk.tokens) - chunk.sample
            for index in range(first, len(chunk.tokens)):
                sample = self._sample(chunk, index, output, row + index - first)
                samples.append(sample)
                if chunk.tokens[index + 1 : index + 2] != (sample.token,):
                    break
            row += chunk.sample
        return tuple(samples)

    def _sample(self, chunk: StepChunk, index: int, output: StageOutput, row: int) -> Sample:
        """The token after the chunk's token `index`, whose logits are row `row` of the output."""
        assert output.logits is not None
        position = chunk.start + index + 1
        params = self._params[chunk.seq]

        def history() -> list[int]:
            return [*self._tokens[chunk.seq], *chunk.tokens[: index + 1]]

        allowed = None
        if params.json_schema and self._constraints is not None:
            try:
                allowed = self._allowed(chunk.seq, params, self._constraints, history)
            except (ValueError, ModelFileError) as error:
                log.warning("sequence %d ends: %s", chunk.seq, error)
                return Sample(chunk.seq, position, NO_TOKEN, 0.0)
            if allowed is None:
                return Sample(chunk.seq, position, NOT_YET, 0.0)
        try:
            choice = choose(output.logits[row], output.summaries[row], params, history, position, allowed)
        except ValueError as error:
            raise StepError(f"sequence {chunk.seq}: {error}") from error
        return Sample(chunk.seq, position, choice.token, choice.logprob, choice.top)

    def _allowed(
        self, seq: int, params: SamplingParams, constraints: Constraints, history: Callable[[], list[int]]
    ) -> Mask | None:
        """None while that is being found out. Raises ValueError when nothing may follow, or it cannot be said;
        ModelFileError."""
        held_to = self._held_to.pop(seq, None) or constraints.constraint(params.json_schema)
        if held_to is None:
            return None
        mask = held_to.allowed(history()[params.prompt_tokens :])
        self._held_to[seq] = held_to
        if len(self._held_to) > MOST_CONSTRAINTS:
            self._held_to.popitem(last=False)
        if not mask[: self._vocab_size].any():
            raise ValueError("no token may follow under the answer's JSON schema")
        return mask


def sampled_rows(chunks: Sequence[StepChunk]) -> list[int]:
    """Of all chunks' tokens one after the other, those after which is sampled."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.tokens)
        rows += range(end - chunk.sample, end)
    return rows
