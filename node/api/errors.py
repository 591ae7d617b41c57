"""Errors of the HTTP API, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec
from aiohttp import web

from swarmd.node.serving.generation import GenerationError

_STATUS = {
    "model_not_found": 404,
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "overloaded": 429,
    "model_loading": 503,
    "not_enough_memory": 503,
    "node_lost": 503,
    "node_leaving": 503,
    "engine_error": 500,
    "deadline": 504,
}


class ApiError(Exception):
    """A request that is refused: HTTP status, a sentence for the user, the parameter at fault and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: GenerationError) -> ApiError:
        """The API's word for an error of the token stream."""
        status = 503 if error.unavailable else _STATUS.get(error.code, 500)
        return cls(status, error.message, param=error.param, code=error.code, retry_after=error.retry_after)

    def body(self) -> dict[str, object]:
        """The JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 401:
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """The whole answer."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), status=self.status, headers=headers)


def json_response(content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Any msgspec-encodable value as a JSON response."""
    return web.Response(
        body=msgspec.json.encode(content), status=status, headers=headers, content_type="application/json"
    )
