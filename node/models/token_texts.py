"""What token ids stand for: the side of a tokenizer that answers need, without its encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from swarmd.node.models.detokenizer import IncrementalDetokenizer


class TokenTexts:
    """One model's tokens. Safe to use from several threads.

    `vocab_size` is the number of ids; `eos_ids` end a generation; those in `hidden` are left out of answers; `spell`
    gives the UTF-8 bytes of an id below `vocab_size`. With `strip_space` one space before a text is not part of it.
    """

    def __init__(
        self,
        spell: Callable[[int], bytes],
        vocab_size: int,
        *,
        eos_ids: frozenset[int],
        hidden: frozenset[int],
        strip_space: bool,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self._spell = spell
        self.hidden = hidden
        self.strip_space = strip_space
        self._bytes: dict[int, bytes] = {}  # of the tokens asked for so far: most streams share most of theirs

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, keep_leading_space: bool = False) -> str:
        """Text of `ids`; `skip_special` leaves control tokens out. See `detokenizer` for
        `keep_leading_space`. Raises ValueError for an id outside the vocabulary."""
        detokenizer = self.detokenizer(skip_special, keep_leading_space=keep_leading_space)
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def detokenizer(self, skip_special: bool = True, *, keep_leading_space: bool = False) -> IncrementalDetokenizer:
        """A decoder for one stream of ids. SentencePiece models put a space before a text, which is stripped
        at the start unless `keep_leading_space`: ask for that when the ids continue a prompt in
        mid-sentence."""

        def piece(token_id: int) -> bytes:
            if skip_special and token_id in self.hidden:
                return b""
            return self.token_bytes(token_id)

        return IncrementalDetokenizer(piece, strip_leading_space=self.strip_space and not keep_leading_space)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that this token stands for, perhaps only a part of a character; a control token's
        are its text. Raises ValueError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD where it is only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")
