"""Answers held to a JSON schema: which tokens may come next.

The decision is llguidance's (https://github.com/guidance-ai/llguidance). As long as a schema is not too complex for it,
that is a function of the schema and of the tokens generated so far, so an answer that is batched, drafted, replayed or
moved goes on under the same constraint. Between JSON's parts may stand a space, or a new line and what it is indented
by, as in llama.cpp (`common/json-schema-to-grammar.cpp`): a small model that may write more of them never stops.

The library is imported where it is needed: most stages never do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache, partial
from itertools import takewhile
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from swarmd.node.engine.sampling import Mask
from swarmd.node.models.token_texts import TokenTexts

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

WHITE_SPACE = r"( |\n( {0,20}|\t{0,8}))"
MOST_STATES = 10_000
"""By llguidance's documentation, its own bounds keep a step below some 20 ms, and this one keeps the states of a
sequence below 20 MB."""

_TRIAL_TOKENS, _BYTES_END = 16, 256
_LONGEST_INTEGER = 17


def check_schema(schema: str) -> None:
    """Raises ValueError, in words for the user, when answers cannot be held to this JSON schema (an object as JSON):
    it is none, or has a keyword of JSON Schema that is not supported, or is too complex: an answer is begun on trial.
    """
    from llguidance import LLMatcher

    grammar = _grammar(schema)
    try:
        error = LLMatcher.validate_grammar(grammar, limits=_limits())
        if not error:
            _try_out(Constraint(_byte_tokens(), grammar))
    except BaseException as panic:
        # Of the library's Rust code, which is no Exception: 1.9 panics over some values that it would refuse.
        if type(panic).__name__ != "PanicException":
            raise
        error = "the schema is not understood"
    if error:
        raise ValueError(f"answers cannot be held to this JSON schema: {' '.join(error.split())[:300]}")


def _try_out(constraint: Constraint) -> None:
    """Raises ValueError when an answer of bytes cannot be begun."""
    tokens: list[int] = []
    while len(tokens) < _TRIAL_TOKENS and _BYTES_END not in tokens:
        choices = constraint.allowed(tokens).nonzero()[0]
        if not len(choices):
            raise ValueError("no answer fits the JSON schema")
        tokens.append(int(choices[-1]))


class Constraints:
    """Makes the constraints of one model's sequences.

    `read_texts` is called once, when the first is made, and may raise ModelFileError. That takes some tenths of a
    second, in a thread of its own; unless `wait`, nobody waits for it.
    """

    def __init__(self, read_texts: Callable[[], TokenTexts], *, wait: bool = True) -> None:
        self._read_texts = read_texts
        self._wait = wait
        self._tokens: Future[LLTokenizer] | None = None

    def constraint(self, schema: str) -> Constraint | None:
        """For one sequence; None while the model's tokens are still being read.

        Raises ValueError when the schema is not one that `check_schema` lets through, or the model has no token that
        ends an answer; what `read_texts` raised.
        """
        if self._tokens is None:
            self._tokens = Future()
            Thread(target=self._read, args=(self._tokens,), name="tokens", daemon=True).start()
        if not (self._wait or self._tokens.done()):
            return None
        return Constraint(self._tokens.result(), _grammar(schema))

    def _read(self, tokens: Future[LLTokenizer]) -> None:
        try:
            texts = self._read_texts()
            if not texts.eos_ids:
                raise ValueError("the model has no token that ends an answer, so none can be held to a JSON schema")
            tokens.set_result(_tokens(texts))
        except BaseException as error:
            tokens.set_exception(error)


class Constraint:
    """Which tokens may follow in one sequence."""

    def __init__(self, tokens: LLTokenizer, grammar: str) -> None:
        self._ends = frozenset(tokens.eos_tokens)
        self._vocab_size = tokens.vocab_size
        self._begin = partial(_matcher, tokens, grammar)
        self._matcher = self._begin()
        self._consumed: list[int] = []
        self._check()

    def allowed(self, generated: Sequence[int]) -> Mask:
        """bool [ids of the vocabulary]: what may follow these tokens. They may be those of the last call and more, or
        fewer, or others. After a complete answer only the tokens that end a generation are left.

        Raises ValueError when they do not fit the schema, or it is too complex to go on with.
        """
        if not self._ends.isdisjoint(generated):
            mask = np.zeros(self._vocab_size, np.bool_)
            mask[list(self._ends)] = True
            return mask
        self._go_to(list(generated))
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(np.bool_)

    def _go_to(self, generated: list[int]) -> None:
        old = self._consumed
        common = len(old)
        if generated[:common] != old:
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, generated, strict=False)))
        if common < len(old) and not self._matcher.rollback(len(old) - common):
            self._matcher, common = self._begin(), 0
        self._consumed = generated
        self._matcher.consume_tokens(generated[common:])
        self._check()

    def _check(self) -> None:
        """Raises ValueError when the matcher has failed, which it would never get over; the next call begins anew."""
        if self._matcher.is_error():
            why = self._matcher.get_error()
            self._matcher, self._consumed = self._begin(), []
            raise ValueError(f"the answer cannot go on under its JSON schema: {' '.join(why.split())[:300]}")


@cache
def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)


def _matcher(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(tokens, grammar, log_level=0, limits=_limits())


def _grammar(schema: str) -> str:
    """Raises ValueError for what is no schema, and for what the library's own code does not survive."""
    from llguidance import LLMatcher

    try:
        parsed = json.loads(schema, parse_int=_exact)
        if isinstance(parsed, dict) and "x-guidance" in parsed:
            raise ValueError("x-guidance is not a keyword of JSON Schema")
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": WHITE_SPACE, "lenient": False}
        )
    except RecursionError:
        raise ValueError("the JSON schema is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not a JSON schema that is an object: {str(error)[:300]}") from None


def _exact(digits: str) -> int:
    """llguidance 1.9 overruns its stack on integers near -2**63."""
    if len(digits) > _LONGEST_INTEGER or abs(int(digits)) >= 1 << 53:
        raise ValueError(f"the integer {digits[:40]} is not one that all JSON software agrees on (RFC 8259, section 6)")
    return int(digits)


@cache
def _byte_tokens() -> LLTokenizer:
    """A vocabulary of the 256 bytes and an end."""
    end = frozenset((_BYTES_END,))
    return _tokens(TokenTexts(lambda i: bytes((i % 256,)), 257, eos_ids=end, hidden=end, strip_space=False))


def _tokens(texts: TokenTexts) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    spelled = _Spelled(texts)
    ends, slices = sorted(texts.eos_ids), LLTokenizer.json_slices()
    tokens = LLTokenizer(TokenizerWrapper(spelled), eos_token=ends, slices=slices)
    spelled.tokenize = tokens.greedy_tokenize
    return tokens


class _Spelled:
    """A tokenizer as llguidance wants it. Where a schema leaves one text only, the tokens of that text are forced: the
    longest that fit. The model's own would cut words by its file's regular expressions, which do not run here (see
    `text_worker`).
    """

    def __init__(self, texts: TokenTexts) -> None:
        self.tokens = [texts.token_bytes(token) for token in range(texts.vocab_size)]
        self.special_token_ids = sorted(texts.hidden | texts.eos_ids)
        self.eos_token_id = min(texts.eos_ids)
        self.bos_token_id = None
        self.tokenize: Callable[[str], list[int]] = lambda text: []

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenize(text.decode("utf-8", "replace"))
