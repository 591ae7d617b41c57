"""A model's tokenizer and chat template, run in a process of their own that can be ended (see `text_worker`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.text_messages import (
    MAX_ANSWER_BYTES,
    NO_MEMORY,
    PREFIX_BYTES,
    Answer,
    CheckSchema,
    Damaged,
    Encode,
    Encoded,
    Opened,
    Question,
    Refused,
    Usable,
)
from swarmd.node.models.token_texts import TokenTexts

log = logging.getLogger("swarmd.models")

# Longer than the processor time that the kernel allows the process, which may wait for a core.
OPEN_SECONDS = 120.0
ANSWER_SECONDS = 60.0
IDLE_SECONDS = 900.0
MOST_WAITING = 64


class TextError(ValueError):
    """A request that the model's template or tokenizer refuses, or takes too long for."""


class TextTooLongError(TextError):
    """The text has more tokens than were asked for: `count`, at least."""

    def __init__(self, count: int) -> None:
        super().__init__(f"the prompt is {count} tokens long")
        self.count = count


class TooBusyError(Exception):
    """Too many texts wait to be tokenized."""


class ModelText:
    """Text in, token ids out, in a process; and back again, here: `tokenizer`.

    One question is answered at a time. One that takes too much time or memory costs the process, and a new one is
    started for the next question. A process that has had nothing to do for long is ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._idle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Answer]] = set()
        self.tokenizer: TokenTexts

    @classmethod
    async def open(cls, path: Path) -> ModelText:
        """Read a GGUF file's header (its tensors need not be there; of a split model the first file), or the small
        files of a folder in Hugging Face's form. Raises ModelFileError."""
        text = cls(path)
        opened = await text._start()
        text.tokenizer = TokenTexts(
            opened.pieces.__getitem__,
            len(opened.pieces),
            eos_ids=opened.eos_ids,
            hidden=opened.hidden,
            strip_space=opened.strip_space,
        )
        return text

    async def encode_chat(self, messages: Sequence[Mapping[str, object]], limit: int) -> list[int]:
        """Token ids of a conversation, at most `limit`, ready for the assistant's answer.

        Raises TextTooLongError when there are more, TextError in words for the user, TooBusyError, ModelFileError.
        """
        return await self._encode(Encode(limit, messages=[dict(message) for message in messages]))

    async def encode_text(self, text: str, limit: int) -> list[int]:
        """Token ids of plain text, at most `limit`; control tokens written in it stay plain text. Raises like
        `encode_chat`."""
        return await self._encode(Encode(limit, text=text))

    async def check_schema(self, schema: str) -> None:
        """Raises TextError, in words for the user, unless answers can be held to this JSON schema; TooBusyError,
        ModelFileError."""
        answer = await self._queue(CheckSchema(schema))
        if not isinstance(answer, Usable):
            raise TextError(answer.message if isinstance(answer, Refused) else "the schema was not looked at")

    async def close(self) -> None:
        """End the process. Idempotent."""
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if process is not None:
            await _end(process)

    async def _encode(self, question: Encode) -> list[int]:
        answer = await self._queue(question)
        if isinstance(answer, Encoded):
            if answer.count > question.limit:
                raise TextTooLongError(answer.count)
            return answer.tokens
        raise TextError(answer.message if isinstance(answer, Refused) else "the tokenizer gave no tokens")

    async def _queue(self, question: Question) -> Answer:
        if self._waiting >= MOST_WAITING:
            raise TooBusyError("too many prompts wait to be read")
        # Whoever asked may leave; the answer still has to be read before the next question.
        self._waiting += 1
        task = asyncio.create_task(self._ask(question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _ask(self, question: Question) -> Answer:
        try:
            async with self._turn:
                if self._process is None or self._process.returncode is not None:
                    await self._start()
                return await self._exchange(question)
        finally:
            self._waiting -= 1
            self._rest()

    async def _exchange(self, question: Question) -> Answer:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        body = msgspec.msgpack.encode(question)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                process.stdin.write(len(body).to_bytes(PREFIX_BYTES, "big") + body)
                with contextlib.suppress(ConnectionError):  # its last words say more, or how it ended
                    await process.stdin.drain()
                return await _read(process)
        except (TimeoutError, EOFError, msgspec.DecodeError) as error:
            reason = await self._lost(process, error)
            what = (
                "checking the schema" if isinstance(question, CheckSchema) else "the model's chat template or tokenizer"
            )
            raise TextError(f"{what} {reason} with this request, and was ended") from None

    async def _start(self) -> Opened:
        process = self._process = await asyncio.create_subprocess_exec(
            # -P: a folder named swarmd in the working directory is not this program.
            *(sys.executable, "-P", "-m", "swarmd.node.models.text_worker", str(self._path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # One text is cut by one thread; memory for more of them would count against the process.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                answer = await _read(process)
        except (TimeoutError, EOFError, msgspec.DecodeError) as error:
            reason = await self._lost(process, error)
            raise ModelFileError(
                f"the tokenizer of {self._path.name} {reason} while it was read; get another copy of the model"
            ) from None
        except BaseException:
            await asyncio.shield(self.close())
            raise
        if isinstance(answer, Opened):
            return answer
        await self.close()
        raise ModelFileError(answer.message if isinstance(answer, Damaged) else f"{self._path.name} cannot be read")

    async def _lost(self, process: asyncio.subprocess.Process, error: Exception) -> str:
        """What became of the process, in words that follow "the tokenizer"."""
        self._process = None
        code = await _end(process)
        log.warning("the text process of %s ended (%s)", self._path.name, code)
        if isinstance(error, TimeoutError) or code == -signal.SIGXCPU:
            return "took too long"
        return "took too much memory" if code in (-signal.SIGABRT, -signal.SIGKILL, NO_MEMORY) else "failed"

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if not self._waiting:
            self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._end_idle)

    def _end_idle(self) -> None:
        if not self._waiting and self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


async def _read(process: asyncio.subprocess.Process) -> Answer:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(PREFIX_BYTES), "big")
    if length > MAX_ANSWER_BYTES:
        raise EOFError
    return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Answer)


async def _end(process: asyncio.subprocess.Process) -> int:
    """End a process, if it has not ended by itself; its exit status."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(1.0):
            return await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()
