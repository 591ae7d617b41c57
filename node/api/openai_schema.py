"""OpenAI requests as swarmd takes them: every field is honoured or refused by name, none is silently dropped.

After the API reference of OpenAI's chat completions and (legacy) completions; `top_k`, `min_p` and
`repetition_penalty` are extensions that other local servers have too.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from swarmd.node.api.errors import ApiError
from swarmd.node.engine.sampling_params import MAX_SCHEMA, SamplingParams
from swarmd.node.serving.generation import GenerationRequest

T = TypeVar("T")
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
PositiveCount = Annotated[int, Meta(ge=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=8)] | None
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

# msgspec says where: "... - at `$.messages[0].role`".
_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`$", re.DOTALL)
_MISSING_FIELD = re.compile(r"missing required field `([^`]+)`$")
_LARGEST_TOKEN = 2**31 - 1
_SMALL_BODY = 128 << 10
_TEXT_FIELDS = frozenset({"messages", "prompt"})


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream is to carry beside its text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """`response_format`: anything."""


class JsonFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """`response_format`: a JSON object."""


class NamedSchema(Struct, forbid_unknown_fields=True):
    """A JSON schema. Answers are held to it whether `strict` or not. `name` and `description` are for models that are
    shown them, which none is here."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: msgspec.Raw
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """`response_format`: JSON after a schema."""

    json_schema: NamedSchema


class TextPart(Struct, forbid_unknown_fields=True):
    """A part of a message's content; only text so far."""

    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, object]:
        """What a chat template gets. A developer message is what models know as a system message."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        role = "system" if self.role == "developer" else self.role
        plain: dict[str, object] = {"role": role, "content": text}
        if self.name:
            plain["name"] = self.name
        return plain


class SamplingFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints share. None is the same as leaving a field out, as in OpenAI's API."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=_LARGEST_TOKEN)] | None = None
    min_p: Unit | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=1)] | None = None
    # These change nothing in an answer by their definition: they name the caller.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_tokens: PositiveCount | None = None
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def generation(self) -> GenerationRequest:
        """The same wishes as the token stream knows them."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
        return GenerationRequest(
            model=self.model,
            sampling=sampling(self, self.top_logprobs or 0, _json_schema(self.response_format)),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stop=stop_strings(self.stop),
            messages=tuple(message.plain() for message in self.messages),
        )


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[int | str], Meta(min_length=1, max_length=1 << 20)] | None = None
    max_tokens: PositiveCount | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None

    def generation(self) -> GenerationRequest:
        """The same wishes as the token stream knows them. 16 tokens by default, as OpenAI's endpoint."""
        return GenerationRequest(
            model=self.model,
            sampling=sampling(self, self.logprobs or 0),
            max_tokens=self.max_tokens or 16,
            stop=stop_strings(self.stop),
            prompt=self._prompt(),
        )

    def _prompt(self) -> str | tuple[int, ...]:
        """One text, which may stand in a list, or the tokens of one."""
        if self.prompt is None:
            raise ApiError(400, "prompt is required", param="prompt", code="missing_required_parameter")
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [item for item in self.prompt if isinstance(item, str)]
        if len(texts) == len(self.prompt) == 1:
            return texts[0]
        if texts:
            message = "prompt: one text, or the tokens of one text, is answered at a time"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return tuple(item for item in self.prompt if isinstance(item, int))


def parse(body: bytes, kind: type[T]) -> T:
    """A request body, checked. Raises ApiError 400 that names the parameter at fault."""
    try:
        if len(body) > _SMALL_BODY:
            _check_bulk(body, kind)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


def _check_bulk(body: bytes, kind: type[Any]) -> None:
    """Refuse a large body whose bulk is not its text: a million keys in another field (or in one that stands twice)
    would take a second to build, in which this node does nothing else."""
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    sketch = msgspec.defstruct("Sketch", [(name, msgspec.Raw, msgspec.Raw()) for name in names])
    fields = msgspec.json.decode(body, type=sketch)
    sizes = {name: len(getattr(fields, name)) for name in names}
    if len(body) - sum(sizes.get(name, 0) for name in _TEXT_FIELDS) > _SMALL_BODY:
        longest = max(sizes.keys() - _TEXT_FIELDS, key=sizes.__getitem__)
        param = longest if sizes[longest] else None
        message = f"more than {_SMALL_BODY >> 10} KiB of the body are not its text; the longest is {longest}"
        raise ApiError(400, message, param=param, code="invalid_value")


def _refusal(text: str) -> ApiError:
    """msgspec's words, with the parameter at fault: the request's own field, however deep in it the fault is."""
    found = _PLACE.search(text)
    place = found[1] if found else ""
    text = _PLACE.sub("", text)
    within = re.split(r"[.\[]", place)[0]
    if unknown := _UNKNOWN_FIELD.search(text):
        name = unknown[1][:100]
        message = f"{f'{name} in {place}' if place else name} is not supported by this server"
        return ApiError(400, message, param=within or name, code="unsupported_parameter")
    if not place and (missing := _MISSING_FIELD.search(text)):
        return ApiError(400, f"{missing[1]} is required", param=missing[1], code="missing_required_parameter")
    return ApiError(400, f"{place}: {text}" if place else text, param=within or None, code="invalid_value")


def sampling(request: SamplingFields, top_logprobs: int, json_schema: str = "") -> SamplingParams:
    """Sampling wishes with OpenAI's defaults; without a seed, one is drawn."""
    values: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": _logit_bias(request.logit_bias) if request.logit_bias else None,
        "seed": request.seed if request.seed is not None else secrets.randbits(63),
        "top_logprobs": top_logprobs,
        "json_schema": json_schema,
    }
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def stop_strings(stop: Stop) -> tuple[str, ...]:
    """One, several or none."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _json_schema(wanted: TextFormat | JsonFormat | SchemaFormat | None) -> str:
    """As JSON, in the client's own order of keys, which is that of the answers; empty for none."""
    if isinstance(wanted, JsonFormat):
        return '{"type":"object"}'
    if not isinstance(wanted, SchemaFormat):
        return ""
    schema = bytes(wanted.json_schema.schema)
    try:
        if len(schema) <= MAX_SCHEMA:
            return schema.decode()
        message = f"more than {MAX_SCHEMA >> 10} KiB"
    except UnicodeDecodeError as error:
        message = str(error)
    message = f"response_format.json_schema.schema: {message}"
    raise ApiError(400, message, param="response_format", code="invalid_value")


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and int(token) <= _LARGEST_TOKEN for token in given):
        raise ApiError(400, "logit_bias: the keys must be token ids", param="logit_bias", code="invalid_value")
    return {int(token): bias for token, bias in given.items()}
