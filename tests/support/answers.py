"""Answers of the chat endpoint, whole and streamed, in a form that tests can compare."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

MODEL = "smollm2:135m"


@dataclass(frozen=True)
class Answer:
    """What came back: the text, the text of each token, why it ended and how many tokens the server counted."""

    text: str
    tokens: tuple[str, ...]
    finish_reason: str
    completion_tokens: int


class StreamError(Exception):
    """The stream ended with a typed error event."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.code: str = error["code"]
        self.kind: str = error["type"]


def chat_body(prompt: str, **options: Any) -> dict[str, Any]:
    """A request for a chat completion, greedy unless told otherwise, with the tokens listed one by one."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "logprobs": True} | options


def answer_of(body: dict[str, Any]) -> Answer:
    """The answer in the body of a chat completion."""
    [choice] = body["choices"]
    tokens = tuple(token["token"] for token in choice["logprobs"]["content"])
    return Answer(choice["message"]["content"], tokens, choice["finish_reason"], body["usage"]["completion_tokens"])


class Stream:
    """A streamed chat completion, read as far as a test wants. Leaving or `close` is what a client does that goes.

    `arrivals` are the monotonic times at which tokens came, one for those that came in one event.
    """

    def __init__(self, events: Iterator[tuple[str, Any]]) -> None:
        self.arrivals: list[float] = []
        self._events = cast("Generator[tuple[str, Any]]", events)
        self._texts: list[str] = []
        self._tokens: list[str] = []
        self._finish_reason = ""
        self._completion_tokens = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokens_read(self) -> int:
        """How many tokens have come so far."""
        return len(self._tokens)

    def read(self, tokens: int) -> None:
        """Read until so many tokens have come; raises StreamError, and AssertionError when the answer is shorter."""
        while len(self._tokens) < tokens:
            assert self.read_event(), f"the stream ended after {len(self._tokens)} tokens"

    def finish(self) -> Answer:
        """Read to the end. Raises StreamError for an error event and TimeoutError when nothing comes for too long."""
        while self.read_event():
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """What has come so far."""
        return Answer("".join(self._texts), tuple(self._tokens), self._finish_reason, self._completion_tokens)

    def close(self) -> None:
        """Go away in the middle."""
        self._events.close()

    def read_event(self) -> bool:
        """Read the next event; False for the end. Raises as `finish` does."""
        ended: Any = ("end", None)
        event, chunk = next(self._events, ended)
        assert event != "end", "the stream broke off without [DONE]"
        if event == "done":
            return False
        if "error" in chunk:
            raise StreamError(chunk["error"])
        if chunk.get("usage"):
            self._completion_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            self._texts.append(choice["delta"].get("content") or "")
            came = [token["token"] for token in (choice["logprobs"] or {}).get("content", ())]
            self._tokens += came
            self.arrivals += [time.monotonic()] * bool(came)
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        return True
