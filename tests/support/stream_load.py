"""Several streams at once, each in a thread: what every client got, and how long it waited for its next token.

with Load(nodes, questions) as load:
    load.until_talking(4)
    ...
    outcomes = load.finish()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from typing import Any, Self

from support.answers import Answer, Stream, StreamError
from support.swarm import Node, Refusal


@dataclass(frozen=True)
class Question:
    """A chat request: the prompt, and the options that are not the usual ones (greedy)."""

    prompt: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, prompt: str, **options: Any) -> Question:
        """With options by name."""
        return cls(prompt, tuple(sorted(options.items())))


@dataclass
class Outcome:
    """What one client saw: an answer, or the code of a typed error, or what else went wrong.

    `wait` is from the request to the first token, `gap` the longest time between two tokens, both in seconds, 0.0
    without any; `silence` is how long it heard nothing before an error, `said` the error's message.
    """

    question: Question
    entry: str
    answer: Answer | None = None
    error: str = ""
    broken: str = ""
    wait: float = 0.0
    gap: float = 0.0
    silence: float = 0.0
    tokens: int = 0
    said: str = ""

    def __str__(self) -> str:
        what = "answered" if self.answer else self.error or self.broken
        return f"{self.entry}: {what} after {self.tokens} tokens, wait {self.wait:.2f} s, gap {self.gap:.2f} s"


@dataclass
class _Client:
    question: Question
    node: Node
    outcome: Outcome
    stream: Stream | None = None
    ended: bool = False

    @property
    def tokens(self) -> int:
        return self.stream.tokens_read if self.stream else 0


class Load:
    """One stream per question, on the nodes in turn. `silence`: after so many seconds without a token a client goes."""

    def __init__(self, nodes: Sequence[Node], questions: Sequence[Question], *, silence: float = 60) -> None:
        self._silence = silence
        self._moved = threading.Condition()
        entries = [nodes[index % len(nodes)] for index in range(len(questions))]
        self._clients = [_Client(q, node, Outcome(q, node.name)) for q, node in zip(questions, entries, strict=True)]
        self._threads = [threading.Thread(target=self._ask, args=(c,), daemon=True) for c in self._clients]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After a failure the nodes end, and with them the threads.
        if kind is None:
            self.finish()

    def tokens(self) -> list[int]:
        """How many tokens each client has."""
        return [client.tokens for client in self._clients]

    def until_talking(self, tokens: int, *, clients: Sequence[int] | None = None, seconds: float = 60) -> None:
        """Wait until so many tokens have come in each of the streams (all, or those of these numbers)."""
        watched = [self._clients[i] for i in (range(len(self._clients)) if clients is None else clients)]

        def talking() -> bool:
            return all(client.ended or client.tokens >= tokens for client in watched)

        with self._moved:
            assert self._moved.wait_for(talking, seconds), f"only {self.tokens()} tokens in {seconds} s"

    def finish(self) -> list[Outcome]:
        """Wait for all ends; a client whose stream has neither ended nor said anything for `silence` says so."""
        for thread in self._threads:
            thread.join()
        return [client.outcome for client in self._clients]

    def _ask(self, client: _Client) -> None:
        def on_stream(stream: Stream) -> None:
            client.stream = stream

        def on_event() -> None:
            with self._moved:
                self._moved.notify_all()

        client.outcome = ask(
            client.node, client.question, silence=self._silence, on_stream=on_stream, on_event=on_event
        )
        with self._moved:
            client.ended = True
            self._moved.notify_all()


def _nothing(*_: object) -> None:
    pass


def ask(
    node: Node,
    question: Question,
    *,
    silence: float,
    on_stream: Callable[[Stream], object] = _nothing,
    on_event: Callable[[], object] = _nothing,
) -> Outcome:
    """Ask one question as a stream and read it to its end; `silence` is the longest wait for its next event."""
    outcome = Outcome(question, node.name)
    began = time.monotonic()
    stream = None
    try:
        with node.stream(question.prompt, timeout=silence, **dict(question.options)) as stream:
            on_stream(stream)
            while stream.read_event():
                on_event()
            outcome.answer = stream.answer
    except StreamError as error:
        outcome.error, outcome.said = error.code, str(error)
    except Refusal as refusal:
        error = refusal.body["error"]
        outcome.error, outcome.said = f"{refusal.status} {error['code']}", error["message"]
    except TimeoutError:
        outcome.broken = f"nothing for {silence:.0f} s"
    except (AssertionError, OSError, HTTPException) as error:
        outcome.broken = f"{type(error).__name__}: {error}"
    _measure(outcome, stream, began)
    return outcome


def _measure(outcome: Outcome, stream: Stream | None, began: float) -> None:
    arrivals, now = stream.arrivals if stream else [], time.monotonic()
    outcome.tokens = stream.tokens_read if stream else 0
    outcome.wait = (arrivals[0] if arrivals else now) - began
    outcome.gap = max((later - earlier for earlier, later in pairwise(arrivals)), default=0.0)
    outcome.silence = now - (arrivals[-1] if arrivals else began)


def compare(outcomes: Sequence[Outcome], expected: Callable[[Question], Answer]) -> list[str]:
    """What is wrong with answers that should equal the undisturbed ones: one line each, empty when all are right."""
    wrong = []
    for outcome in outcomes:
        if outcome.answer is None:
            wrong.append(f"{outcome} [{outcome.question.prompt[:40]!r}]")
        elif (right := expected(outcome.question)) != outcome.answer:
            wrong.append(f"{outcome.entry}: {difference(outcome.answer, right)} [{outcome.question}]")
    return wrong


def difference(got: Answer, right: Answer) -> str:
    """Where an answer leaves the right one, in words."""
    for index, (one, other) in enumerate(zip(got.tokens, right.tokens, strict=False)):
        if one != other:
            return f"token {index} of {len(right.tokens)} is {one!r}, not {other!r}"
    if len(got.tokens) != len(right.tokens):
        return f"{len(got.tokens)} tokens, not {len(right.tokens)}"
    return f"{got} instead of {right}"
