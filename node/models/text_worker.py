"""The process that runs what a model's text files bring along: the regular expressions of its tokenizer and the program
that is its chat template. Clients' JSON schemas are tried here too.

All of it comes from strangers, and none can be bounded in time from within: one match, or one call of a built-in, can
take for ever, and holds Python's lock meanwhile. So they run here, and the kernel ends this process when it uses too
much processor time or memory. It has no sockets and no secrets.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.front import ModelFront
from swarmd.node.models.text_messages import (
    MAX_QUESTION_BYTES,
    NO_MEMORY,
    PREFIX_BYTES,
    Answer,
    Damaged,
    Encode,
    Encoded,
    Opened,
    Question,
    Refused,
    Usable,
)

MAX_MEMORY = 2 << 30
LOAD_SECONDS = 60
ANSWER_SECONDS = 2
BYTES_PER_SECOND = 512 << 10
"""By which long texts are allowed more time; a CPU of 2020 tokenizes about twice as fast."""


def serve(path: Path, questions: BinaryIO, answers: BinaryIO) -> None:
    """Read the model's files and answer until the questions end."""
    _limit(resource.RLIMIT_DATA, MAX_MEMORY)
    _allow_seconds(LOAD_SECONDS)
    try:
        front = ModelFront.load(path)
        opened = _opened(front)
    except ModelFileError as error:
        _say(answers, Damaged(str(error)))
        return
    _say(answers, opened)
    longest = max(map(len, opened.pieces), default=1)
    del opened
    while (question := _read(questions)) is not None:
        _allow_seconds(ANSWER_SECONDS + len(question) // BYTES_PER_SECOND)
        _say(answers, _answer(front, msgspec.msgpack.decode(question, type=Question), longest))


def _opened(front: ModelFront) -> Opened:
    tokenizer = front.tokenizer
    pieces = tuple(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))
    return Opened(pieces, tokenizer.eos_ids, tokenizer.hidden, tokenizer.strip_space)


def _answer(front: ModelFront, asked: Question, longest: int) -> Answer:
    try:
        if isinstance(asked, Encode):
            return _encoded(front, asked, longest)
        _check(asked.schema)
    except ValueError as error:
        return Refused(str(error))
    return Usable()


def _encoded(front: ModelFront, asked: Encode, longest: int) -> Encoded:
    """Raises ValueError in words for the user."""
    encode: Callable[[str], list[int]] = front.encode_text
    text = asked.text
    if asked.messages is not None:
        text, encode = front.render(asked.messages), front.encode_rendered
    # No token stands for more than `longest` bytes: what is hopelessly long need not be tokenized to be refused.
    least = math.ceil(len(text) / max(longest, 1))
    tokens = encode(text) if least <= asked.limit else []
    count = max(len(tokens), least)
    return Encoded(tokens if count <= asked.limit else [], count)


def _check(schema: str) -> None:
    from swarmd.node.engine.constraint import check_schema  # few processes are ever asked for it

    check_schema(schema)


def _allow_seconds(seconds: int) -> None:
    """From now on; the kernel ends the process (SIGXCPU) within a second after that, whatever it is doing."""
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)


def _limit(what: int, soft: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _read(questions: BinaryIO) -> bytes | None:
    prefix = questions.read(PREFIX_BYTES)
    length = int.from_bytes(prefix, "big")
    if len(prefix) < PREFIX_BYTES or length > MAX_QUESTION_BYTES:
        return None
    question = questions.read(length)
    return question if len(question) == length else None


def _say(answers: BinaryIO, answer: Answer) -> None:
    body = msgspec.msgpack.encode(answer)
    answers.write(len(body).to_bytes(PREFIX_BYTES, "big") + body)
    answers.flush()


def main() -> None:
    """`python -m swarmd.node.models.text_worker PATH`."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    # Whatever else is printed in this process must not stand between its answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            serve(Path(sys.argv[1]), sys.stdin.buffer, answers)
        except MemoryError:
            sys.exit(NO_MEMORY)
        except BaseException as error:
            # A panic of the library's Rust code, like its limit on backtracking; it has said why on standard error.
            if type(error).__name__ != "PanicException":
                raise
            sys.exit(1)


if __name__ == "__main__":
    main()
