"""From token ids back to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class IncrementalDetokenizer:
    """Turns ids into text as they come. The pieces joined, with `flush()` last, equal `Tokenizer.decode` of
    all the ids.

    A character whose UTF-8 bytes are spread over several tokens is held back until its last byte is there;
    bytes that can no longer become a character are U+FFFD each maximal run (Unicode's recommended practice,
    as `bytes.decode` does).
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_leading_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_leading_space

    def push(self, token_id: int) -> str:
        """The text that this token completes, often "". Raises ValueError for an id outside the
        vocabulary."""
        data = self._token_bytes(token_id)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is still held back: "" or U+FFFD for a character whose end never came. The detokenizer is
        fresh after it, except that a leading space is no longer stripped."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
