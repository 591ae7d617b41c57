"""What a daemon and the process that reads a model's text files say to each other: msgpack behind a length of four
bytes, big-endian, over the process's standard input and output."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from swarmd.node.models.vocabulary import MAX_TOKENS

PREFIX_BYTES = 4
MAX_QUESTION_BYTES = 64 << 20
MAX_ANSWER_BYTES = 256 << 20
NO_MEMORY = 12
"""Exit status of the process when Python got no more memory."""

TokenIds = frozenset[Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]]


class Opened(Struct, tag=True):
    """The first answer: the bytes of every token, and what `TokenTexts` wants to know about them."""

    pieces: Annotated[tuple[bytes, ...], Meta(max_length=MAX_TOKENS)]
    eos_ids: TokenIds
    hidden: TokenIds
    strip_space: bool


class Damaged(Struct, tag=True):
    """The first answer when the files cannot be used (a ModelFileError's words)."""

    message: str


class Encode(Struct, tag=True):
    """Ids of a conversation, or without one of a text; at most `limit` are wanted."""

    limit: int
    text: str = ""
    messages: list[dict[str, Any]] | None = None


class Encoded(Struct, tag=True):
    """The ids, or none of them if there are more than the limit; `count` is how many there are, at least."""

    tokens: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]], Meta(max_length=MAX_TOKENS)]
    count: int


class Refused(Struct, tag=True):
    """The template cannot or will not have this conversation, or the schema cannot be used; in words for the user."""

    message: str


class CheckSchema(Struct, tag=True):
    """Whether answers can be held to this JSON schema (see `constraint`)."""

    schema: str


class Usable(Struct, tag=True):
    """They can."""


Question = Encode | CheckSchema
Answer = Opened | Damaged | Encoded | Usable | Refused
