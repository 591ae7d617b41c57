"""OpenAI's dialect: chat completions, completions and models, as adapters of the internal token stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from swarmd.node.api.errors import ApiError, json_response
from swarmd.node.api.event_stream import EventStream
from swarmd.node.api.openai_schema import ChatRequest, CompletionRequest, parse
from swarmd.node.api.view import NODE, NodeView, guarded
from swarmd.node.serving.gateway import Prepared
from swarmd.node.serving.generation import Ending, GenerationError, Piece, PieceToken

Json = dict[str, object]


def add_routes(app: web.Application) -> None:
    """`/v1/...`."""
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{model:.+}", get_model)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    asked = parse(await request.read(), ChatRequest)
    return await _answer(request, asked, Chat(asked))


async def completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`."""
    asked = parse(await request.read(), CompletionRequest)
    return await _answer(request, asked, Text(asked))


async def list_models(request: web.Request) -> web.Response:
    """`GET /v1/models`: one payload that OpenAI's and Anthropic's clients both accept."""
    data = [_model(name, created) for name, created in request.app[NODE].served_models()]
    edge = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return json_response({"object": "list", "data": data, "has_more": False, **edge})


async def get_model(request: web.Request) -> web.Response:
    """`GET /v1/models/NAME`."""
    name = request.match_info["model"]
    for served, created in request.app[NODE].served_models():
        if served == name:
            return json_response(_model(served, created))
    raise ApiError(
        404, f"no instance of model {name[:200]!r} runs in this swarm", param="model", code="model_not_found"
    )


class Chat:
    """Shapes of chat completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: ChatRequest) -> None:
        self.logprobs = bool(asked.logprobs)

    def opening(self) -> Json | None:
        """The choice of the first chunk."""
        return _chunk_choice({"role": "assistant", "content": ""}, None, None)

    def piece(self, piece: Piece) -> Json:
        """A chunk's choice."""
        return _chunk_choice({"content": piece.text}, self._logprobs(piece.tokens), None)

    def ending(self, reason: str) -> Json:
        """The last chunk's choice."""
        return _chunk_choice({}, None, reason)

    def whole(self, text: str, tokens: list[PieceToken], reason: str) -> Json:
        """The choice of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: list[PieceToken] | tuple[PieceToken, ...]) -> Json | None:
        if not self.logprobs:
            return None
        content = [
            _logprob(t.text, t.logprob) | {"top_logprobs": [_logprob(text, value) for text, value in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


class Text:
    """Shapes of (legacy) completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: CompletionRequest) -> None:
        self.logprobs = asked.logprobs is not None
        self._offset = 0

    def opening(self) -> Json | None:
        """Nothing comes before the first text."""
        return None

    def piece(self, piece: Piece) -> Json:
        """A chunk's choice."""
        return self._choice(piece.text, piece.tokens, None)

    def ending(self, reason: str) -> Json:
        """The last chunk's choice."""
        return self._choice("", (), reason)

    def whole(self, text: str, tokens: list[PieceToken], reason: str) -> Json:
        """The choice of an answer that is not streamed."""
        return self._choice(text, tokens, reason)

    def _choice(self, text: str, tokens: list[PieceToken] | tuple[PieceToken, ...], reason: str | None) -> Json:
        logprobs = self._logprobs(tokens) if self.logprobs else None
        return {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[PieceToken] | tuple[PieceToken, ...]) -> Json:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens],
            "text_offset": offsets,
        }


async def _answer(
    request: web.Request, asked: ChatRequest | CompletionRequest, shape: Chat | Text
) -> web.StreamResponse:
    node = request.app[NODE]
    prepared = await guarded(node.prepare(asked.generation()))
    head: Json = {
        "id": f"{shape.prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": asked.model,
    }
    if not asked.stream:
        return await _whole(node, prepared, head, shape)
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return await _stream(request, node, prepared, head | {"object": shape.chunk_object}, shape, include_usage)


async def _whole(node: NodeView, prepared: Prepared, head: Json, shape: Chat | Text) -> web.Response:
    text, tokens = [], []
    async with aclosing(node.observe(prepared)) as items:
        try:
            async for item in items:
                if isinstance(item, Ending):
                    choice = shape.whole("".join(text), tokens, item.reason)
                    body = head | {"object": shape.object, "choices": [choice], "usage": _usage(item)}
                    return json_response(body)
                text.append(item.text)
                tokens += item.tokens
        except GenerationError as error:
            raise ApiError.of(error) from error
    raise ApiError(500, "the answer ended without a reason", code="engine_error")


async def _stream(
    request: web.Request, node: NodeView, prepared: Prepared, head: Json, shape: Chat | Text, include_usage: bool
) -> web.StreamResponse:
    """Server-sent events. Leaving early cancels the generation.

    The headers wait for the first token, so that a request refused until then gets its status and `Retry-After`. Later
    errors are typed events.
    """
    stream = EventStream(request)
    async with (
        aclosing(node.observe(prepared)) as items,
        aclosing(_choices(items, shape)) as chunks,
        stream.commented(),
    ):
        try:
            async for choices, usage in chunks:
                bodies = [head | {"choices": [choice]} for choice in choices]
                if include_usage:
                    bodies = [body | {"usage": None} for body in bodies]
                    if usage is not None:
                        bodies.append(head | {"choices": [], "usage": usage})
                await stream.write(b"".join(map(_event, bodies)))
        except GenerationError as error:
            if not stream.begun:
                raise ApiError.of(error) from error
            await stream.end(_event(ApiError.of(error).body()))
        else:
            await stream.end(b"data: [DONE]\n\n")
    return stream.response


async def _choices(
    items: AsyncGenerator[Piece | Ending], shape: Chat | Text
) -> AsyncGenerator[tuple[list[Json], Json | None]]:
    """The choices of chunks that are to go out together, and in the end the usage; nothing before the first item."""
    opening = shape.opening()
    async for item in items:
        choices = [opening] if opening is not None else []
        opening = None
        if isinstance(item, Ending):
            choices.append(shape.ending(item.reason))
            yield choices, _usage(item)
            continue
        if item.text or (shape.logprobs and item.tokens):
            choices.append(shape.piece(item))
        if choices:
            yield choices, None


def _event(body: Json) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _chunk_choice(delta: Json, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprob(text: str, value: float) -> Json:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _usage(ending: Ending) -> Json:
    total = ending.prompt_tokens + ending.completion_tokens
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "total_tokens": total,
    }


def _model(name: str, created: int) -> Json:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": created,
        "created_at": stamp,
        "owned_by": "swarmd",
        "display_name": name,
    }
