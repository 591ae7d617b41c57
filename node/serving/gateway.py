"""The entry node's side of a request: find the instance, tokenize, stream from its driver, go on when it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from swarmd.discovery.records import InstanceRecord, InstanceState
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.catalog import ModelNameError, is_path
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.text_process import ModelText, TextTooLongError, TooBusyError
from swarmd.node.serving.generation import Ending, GenerationError, GenerationRequest, Piece
from swarmd.node.serving.messages import Finished, Generate, Token
from swarmd.node.serving.recovery import Attempt, Fail, Patience, Recovery, lacks_memory
from swarmd.node.serving.text_stream import TextStream
from swarmd.transport.link import Link, LinkClosed, RemoteError, RemoteStream

log = logging.getLogger("swarmd.gateway")

READY_SECONDS = 30.0
MOST_STREAMS = 384
WATCH_SECONDS = 0.5
# What a driver says when another one, of a later epoch, will answer; those of the second kind accuse nobody.
_LOST_CODES = frozenset({"stage_lost", "unreachable"})
_MOVED_CODES = frozenset({"stale_epoch", "not_driver"})
# What it says when it has too many requests: all places taken, or all taken for too long.
_BUSY_CODES = frozenset({"overloaded", "busy", "queue_timeout"})

FindInstance = Callable[[str], InstanceRecord | None]
DriverLink = Callable[[InstanceRecord], Awaitable[Link]]
LoadFront = Callable[[InstanceRecord], Awaitable[ModelText]]
Launch = Callable[[str], Awaitable[object]]


@dataclass
class Prepared:
    """A request that was checked and tokenized, ready to stream."""

    request: GenerationRequest
    record: InstanceRecord
    front: ModelText
    prompt: list[int]
    max_tokens: int


class Gateway:
    """Turns requests into streams of text.

    `find` gives the instance that serves a model name, `launch` starts one for a model that can be had by name
    (ModelNameError, ModelFileError, OSError when it cannot), `driver_link` is a link to its driver (RemoteError
    `unreachable`), `load_front` its tokenizer and template; `changed` fires when the swarm's state has.

    `streams` is how many answers are under way here, `most_streams` at most; while `leaving`, no new ones are taken.
    """

    def __init__(
        self,
        find: FindInstance,
        launch: Launch,
        driver_link: DriverLink,
        load_front: LoadFront,
        changed: Signal,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        most_streams: int = MOST_STREAMS,
    ) -> None:
        self._find = find
        self._launch = launch
        self._driver_link = driver_link
        self._load_front = load_front
        self._changed = changed
        self.leaving = False
        self.streams = 0
        self._patience = patience
        self._most_streams = most_streams
        self._preparing = 0

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Check a request against its model. Raises GenerationError; nothing is computed yet."""
        if self.leaving:
            raise GenerationError("node_leaving", "this node is leaving the swarm; ask another node", retry_after=5)
        self._admit(self.streams + self._preparing)
        self._preparing += 1
        try:
            return await self._prepare(request)
        finally:
            self._preparing -= 1

    def _admit(self, others: int) -> None:
        if others >= self._most_streams:
            words = f"this node has {others} answers under way, as many as it takes; ask another, or in a moment"
            raise GenerationError("overloaded", words, retry_after=2, unavailable=True)

    async def _prepare(self, request: GenerationRequest) -> Prepared:
        if self._find(request.model) is None:
            await self._start(request.model)
        record = await self._ready(request.model, READY_SECONDS)
        param = "messages" if request.messages is not None else "prompt"
        try:
            front = await self._load_front(record)
            prompt = await _encode(front, request, record.model.context)
            param = "response_format"
            if request.sampling.json_schema:
                if not front.tokenizer.eos_ids:
                    raise ValueError("this model has no token that ends an answer, so none can be held to a schema")
                await front.check_schema(request.sampling.json_schema)
        except TextTooLongError as error:
            raise _too_long(request, record, f"at least {error.count}") from error
        except TooBusyError as error:
            raise GenerationError("overloaded", str(error), retry_after=2) from error
        except ModelFileError as error:
            raise GenerationError("model_loading", str(error), retry_after=5) from error
        except ValueError as error:
            raise GenerationError("invalid_request", str(error), param=param) from error
        biased = request.sampling.logit_bias
        outside = [token for token in biased if not 0 <= token < front.tokenizer.vocab_size]
        if outside:
            message = f"logit_bias names token {outside[0]}; the vocabulary has {front.tokenizer.vocab_size}"
            raise GenerationError("invalid_request", message, param="logit_bias")
        room = record.model.context - len(prompt)
        if not prompt:
            raise GenerationError("invalid_request", "the prompt is empty", param="prompt")
        if room <= 0:
            raise _too_long(request, record, str(len(prompt)))
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        return Prepared(request, record, front, prompt, max_tokens)

    async def stream(self, prepared: Prepared) -> AsyncGenerator[Piece | Ending]:
        """The answer, ended by Ending, as `_stream` gives it. Raises GenerationError."""
        self._admit(self.streams)
        self.streams += 1
        try:
            async with aclosing(self._stream(prepared)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self.streams -= 1
            self._changed.notify()

    async def _stream(self, prepared: Prepared) -> AsyncGenerator[Piece | Ending]:
        """The answer, ended by Ending.

        When the driver or a stage is lost, the prompt and the tokens so far are replayed in the next epoch and the
        answer goes on, as `Recovery` decides. Raises GenerationError when it cannot.
        """
        text = TextStream(prepared.front.tokenizer, prepared.request.stop, continues=prepared.request.messages is None)
        recovery = Recovery(time.monotonic(), random.random(), self._patience)
        record: InstanceRecord | None = prepared.record
        while True:
            match recovery.next(record, time.monotonic()):
                case Fail(code=code, message=message, retry_after=retry_after):
                    raise GenerationError(code, message, retry_after=retry_after)
                case Attempt(record=chosen):
                    try:
                        async with aclosing(self._attempt(prepared, chosen, text, recovery)) as pieces:
                            async for piece in pieces:
                                yield piece
                        return
                    except (LinkClosed, RemoteError) as error:
                        self._lose(chosen, error, recovery)
                case wait:
                    await self._changed.wait(max(0.0, wait.until - time.monotonic()))
            record = self._find(prepared.request.model)

    def _lose(self, record: InstanceRecord, error: LinkClosed | RemoteError, recovery: Recovery) -> None:
        """An attempt came to its end. Raises GenerationError when no other would do better."""
        code = error.code if isinstance(error, RemoteError) else "stage_lost"
        reason = error.message if isinstance(error, RemoteError) else error.reason
        moved = code in _MOVED_CODES
        if code in _BUSY_CODES and recovery.recovering:
            moved = True  # an answer that has begun waits for its place
        elif code not in _LOST_CODES and not moved:
            raise _refusal(code, reason) from error
        log.warning("the pipeline of %s, epoch %d, was lost (%s)", record.model.name, record.epoch, reason)
        recovery.on_lost(reason, time.monotonic(), moved=moved)

    async def _attempt(
        self, prepared: Prepared, record: InstanceRecord, text: TextStream, recovery: Recovery
    ) -> AsyncGenerator[Piece | Ending]:
        """Stream from one driver; raises LinkClosed or RemoteError when it is lost or given up."""
        n_prompt, left = len(prepared.prompt), prepared.max_tokens - len(text.tokens)
        if left <= 0:
            yield text.finish()
            yield Ending("stop" if text.stopped else "length", n_prompt, len(text.tokens))
            return
        order = Generate(
            instance=record.id,
            epoch=record.epoch,
            tokens=(*prepared.prompt, *text.tokens),
            sampling=replace(prepared.request.sampling, prompt_tokens=n_prompt),
            max_tokens=left,
            stop_tokens=tuple(sorted(prepared.front.tokenizer.eos_ids)),
        )
        link = await self._driver_link(record)
        async with link.stream(order) as items, self._watching(items, prepared.request.model, recovery):
            async for item in items:
                # What came together goes on together.
                came = (item, *items.arrived())
                if tokens := [token for token in came if isinstance(token, Token)]:
                    recovery.on_tokens(time.monotonic())
                    yield text.push(*tokens)
                    if text.stopped:
                        yield Ending("stop", n_prompt, len(text.tokens))
                        return
                if isinstance(came[-1], Finished):
                    yield text.finish()
                    reason = "stop" if text.stopped else came[-1].reason
                    yield Ending(reason, n_prompt, len(text.tokens))
                    return
        raise LinkClosed("the driver ended the stream early")

    @asynccontextmanager
    async def _watching(self, items: RemoteStream, model: str, recovery: Recovery) -> AsyncGenerator[None]:
        """Give an attempt up when another epoch serves, which a driver that stands still tells nobody."""

        async def watch() -> None:
            while not recovery.abandon(self._find(model), time.monotonic()):
                await self._changed.wait(WATCH_SECONDS)
            items.abandon("its epoch is over, or its driver stands still")

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()

    async def _start(self, model: str) -> None:
        """The first request for a model starts it. Paths are for the command line: a client names models."""
        try:
            if is_path(model):
                raise ModelNameError(f"no instance of model {model!r} runs in this swarm")
            await self._launch(model)
        except ModelNameError as error:
            raise GenerationError("model_not_found", str(error), param="model") from error
        except (ModelFileError, OSError) as error:
            raise GenerationError("model_loading", str(error), retry_after=30) from error

    async def _ready(self, model: str, seconds: float) -> InstanceRecord:
        """The instance of a model, ready; waits for one that is on its way."""
        deadline = time.monotonic() + seconds
        while True:
            record = self._find(model)
            if record is not None and record.state is InstanceState.READY:
                return record
            if record is not None and lacks_memory(record):
                raise GenerationError("not_enough_memory", record.reason, retry_after=10)
            left = deadline - time.monotonic()
            if left <= 0:
                state = record.state if record is not None else "gone"
                raise GenerationError(
                    "model_loading",
                    f"model {model!r} is not ready yet ({state}); try again soon",
                    retry_after=5,
                )
            await self._changed.wait(left)


def _refusal(code: str, message: str) -> GenerationError:
    """What a driver said about a request that it does not serve."""
    if code in _BUSY_CODES:
        return GenerationError("overloaded", message, retry_after=2, unavailable=code == "queue_timeout")
    if code == "unfit":
        return GenerationError("invalid_request", message, param="response_format")
    if code == "invalid":
        return GenerationError("context_length_exceeded", message)
    return GenerationError("deadline" if code == "deadline" else "engine_error", message)


def _too_long(request: GenerationRequest, record: InstanceRecord, tokens: str) -> GenerationError:
    return GenerationError(
        "context_length_exceeded",
        f"the prompt is {tokens} tokens long and the context of {record.model.name} here is "
        f"{record.model.context} tokens; shorten it, or start the swarm with a larger --context",
        param="messages" if request.messages is not None else "prompt",
    )


async def _encode(front: ModelText, request: GenerationRequest, limit: int) -> list[int]:
    if request.messages is not None:
        return await front.encode_chat(request.messages, limit)
    if isinstance(request.prompt, str):
        return await front.encode_text(request.prompt, limit)
    tokens = list(request.prompt or ())
    if any(not 0 <= token < front.tokenizer.vocab_size for token in tokens):
        raise ValueError(f"token ids must be between 0 and {front.tokenizer.vocab_size - 1}")
    return tokens
