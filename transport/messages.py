"""Message bodies: the vocabulary of a link, the hello, and the small records of the link protocol itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, Union

import msgspec
from msgspec import Meta, Raw, Struct

from swarmd.transport.frames import FrameError

PROTOCOL_VERSION = 1

Role = Literal["daemon", "stage", "probe"]
_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()

EMPTY = Raw(_encoder.encode(None))


class Hello(Struct, frozen=True):
    """What a process says of itself as its first frame. Later versions may add fields, never change these.

    `endpoint` is filled by the endpoint: a random name of this one process, by which it notices that it
    dialled itself.
    """

    protocol: int
    role: Role
    name: Annotated[str, Meta(max_length=64)]
    version: Annotated[str, Meta(max_length=32)]
    note: Annotated[str, Meta(max_length=512)] = ""
    endpoint: Annotated[str, Meta(max_length=32)] = ""


class ErrorBody(Struct, frozen=True, array_like=True):
    """Body of an ERROR frame: a short code for programs and a sentence for people."""

    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=4096)]


class RemoteError(Exception):
    """A refusal by the other side. A handler raises it to say why it cannot answer.

    Codes of the link itself: ``internal`` (the handler failed; its log says why), ``busy`` (too many requests
    at once), ``unknown`` (the handler does not know this message).
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class LinkClosed(ConnectionError):
    """The link is down; `reason` is a sentence."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Vocabulary:
    """The messages that a link carries: a tagged union of Struct classes, encoded as msgpack."""

    def __init__(self, classes: tuple[type[Struct], ...]):
        """Raises `ValueError` unless every class has a tag and no two have the same."""
        tags = [cls.__struct_config__.tag for cls in classes]
        if not classes or None in tags or len(set(tags)) != len(tags):
            raise ValueError("a vocabulary needs message classes with tags that differ")
        self.classes = frozenset(classes)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Union[classes])  # noqa: UP007

    def encode(self, message: Struct) -> Raw:
        """The body of `message`; `TypeError` if its class is not in the vocabulary."""
        if type(message) not in self.classes:
            raise TypeError(f"{type(message).__name__} is not in this link's vocabulary")
        return Raw(_encoder.encode(message))

    def decode(self, body: Raw) -> Struct:
        """The message in a body; `FrameError` if it is unknown or malformed."""
        try:
            return self._decoder.decode(body)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"a message is unknown or malformed: {error}") from None


def encode_body(value: object) -> Raw:
    """A protocol record (hello, error, credit, goodbye) as a frame's body."""
    return Raw(_encoder.encode(value))


def decode_body(body: Raw, kind: type[_T]) -> _T:
    """A protocol record from a frame's body; `FrameError` if it is anything else."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a {kind.__name__} is malformed: {error}") from None


def decode_hello(body: Raw) -> Hello:
    """The other side's hello.

    `FrameError` if it is malformed or its words could not be shown in a log line.
    """
    hello = decode_body(body, Hello)
    if not (hello.name + hello.version + hello.note + hello.endpoint).isprintable():
        raise FrameError("a hello holds characters that cannot be printed")
    return hello


def one_line(text: str, limit: int = 300) -> str:
    """Text from another machine, fit for a log line: at most `limit` printable characters."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])
