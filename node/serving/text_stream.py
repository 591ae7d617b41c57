"""From token ids to text: detokenizing, stop strings and log-probabilities of one generation. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from swarmd.node.models.stop_strings import StopMatcher
from swarmd.node.models.token_texts import TokenTexts
from swarmd.node.serving.generation import Piece, PieceToken
from swarmd.node.serving.messages import Token


class TextStream:
    """The text side of one generation. It survives a change of drivers: tokens are all it is fed.

    `continues` says that the tokens go on with a text in mid-sentence, so that a space at their beginning counts.
    """

    def __init__(self, tokenizer: TokenTexts, stop: Sequence[str], *, continues: bool = False) -> None:
        self.tokens: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(keep_leading_space=continues)
        self._matcher = StopMatcher(stop)

    def push(self, *arrived: Token) -> Piece:
        """Take tokens; the text that may be shown now. At a stop string it sets `stopped` and leaves the rest alone."""
        shown, tokens = "", []
        text_of = self._tokenizer.token_text
        for token in arrived:
            self.tokens.append(token.token)
            text, self.stopped = self._matcher.push(self._detokenizer.push(token.token))
            top = tuple([(text_of(id_), logprob) for id_, logprob in token.top]) if token.top else ()
            tokens.append(PieceToken(text_of(token.token), token.logprob, top))
            shown += text
            if self.stopped:
                break
        return Piece(shown, tuple(tokens))

    def finish(self) -> Piece:
        """The text that was held back, at the end; sets `stopped` if a stop string is complete only now."""
        if self.stopped:
            return Piece("")
        text, self.stopped = self._matcher.push(self._detokenizer.flush())
        return Piece(text if self.stopped else text + self._matcher.flush())
