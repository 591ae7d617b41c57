"""What each frame that a link receives means: a message for its handler, or a step of an exchange."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarmd.transport.exchanges import Answering, Asked
from swarmd.transport.frames import Flow, Frame, FrameError
from swarmd.transport.handler import LinkHandler
from swarmd.transport.messages import ErrorBody, LinkClosed, RemoteError, Vocabulary, decode_body, one_line
from swarmd.transport.receiver import Unfinished

if TYPE_CHECKING:
    from swarmd.transport.link import Link

log = logging.getLogger("swarmd.transport")


class Dispatch:
    """Acts on the frames of one link; `on_goodbye` hears that the other side closed it, and why."""

    def __init__(
        self,
        link: Link,
        vocabulary: Vocabulary,
        handler: LinkHandler,
        asked: Asked,
        answering: Answering,
        on_goodbye: Callable[[str], None],
    ) -> None:
        self._link = link
        self._vocabulary = vocabulary
        self._handler = handler
        self._asked = asked
        self._answering = answering
        self._flows: dict[Flow, Callable[[Frame], None]] = {
            Flow.REQUEST: self._on_request,
            Flow.REPLY: self._on_reply,
            Flow.ERROR: self._on_error,
            Flow.STREAM: self._on_stream,
            Flow.STREAM_ITEM: self._on_item,
            Flow.STREAM_END: self._on_end,
            Flow.CANCEL: lambda frame: answering.cancel(frame.envelope.id),
            Flow.CREDIT: self._on_credit,
            Flow.GOODBYE: lambda frame: on_goodbye(_explain_goodbye(decode_body(frame.envelope.body, str))),
        }

    def take(self, frame: Frame) -> Unfinished | None:
        """Act on a frame; what is returned must be awaited before the next. Raises `FrameError` for a breach."""
        if self._link.closed:
            return None  # said goodbye: only the end of the stream is awaited
        flow = frame.envelope.flow
        if flow == Flow.ONEWAY:
            return self._on_message(frame)
        if flow not in self._flows:
            raise FrameError(f"a {flow.name} frame is out of place")
        self._flows[flow](frame)
        return None

    def _on_message(self, frame: Frame) -> Unfinished | None:
        message = self._vocabulary.decode(frame.envelope.body)
        try:
            waiting = self._handler.on_message(self._link, message, frame.payload)
        except LinkClosed:
            return None
        except Exception:
            log.exception("a handler failed on a %s", type(message).__name__)
            return None
        return None if waiting is None else (message, waiting)

    def _on_request(self, frame: Frame) -> None:
        link, message, payload = self._link, self._vocabulary.decode(frame.envelope.body), frame.payload
        answer = self._handler.on_request
        self._answering.request(frame.envelope.id, len(payload), lambda: answer(link, message, payload))

    def _on_stream(self, frame: Frame) -> None:
        link, message, payload = self._link, self._vocabulary.decode(frame.envelope.body), frame.payload
        answer = self._handler.on_stream
        self._answering.stream(frame.envelope.id, len(payload), lambda: answer(link, message, payload))

    def _on_reply(self, frame: Frame) -> None:
        message = self._vocabulary.decode(frame.envelope.body)
        self._asked.check(frame.envelope.id)
        self._asked.reply(frame.envelope.id, message, frame.payload)

    def _on_error(self, frame: Frame) -> None:
        body = decode_body(frame.envelope.body, ErrorBody)
        self._asked.check(frame.envelope.id)
        self._asked.error(frame.envelope.id, RemoteError(body.code, body.message))

    def _on_item(self, frame: Frame) -> None:
        item = self._vocabulary.decode(frame.envelope.body)
        self._asked.check(frame.envelope.id)
        self._asked.item(frame.envelope.id, item)

    def _on_end(self, frame: Frame) -> None:
        self._asked.check(frame.envelope.id)
        self._asked.end(frame.envelope.id)

    def _on_credit(self, frame: Frame) -> None:
        self._answering.grant(frame.envelope.id, decode_body(frame.envelope.body, int))


def _explain_goodbye(reason: str) -> str:
    return f"the other side closed the link: {one_line(reason)}"
