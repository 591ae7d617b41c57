"""How text is cut into words before byte-pair merging: one entry per value of `tokenizer.ggml.pre`.

The expressions are those of the models' own `tokenizer.json` files, which llama.cpp's `src/llama-vocab.cpp`
(`llm_tokenizer_bpe`) quotes beside its adapted forms. Each expression cuts the pieces that the one before it
left; text between two matches is a piece of its own.
"""

from __future__ import annotations

from typing import NamedTuple

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class PreTokenizerSpec(NamedTuple):
    """`patterns` in the order they cut; `nfc`: text is NFC-normalised first; `ignore_merges`: a word that is
    itself a token is taken whole, whatever the merges say; `add_bos`: a BOS token starts a text unless the
    metadata says otherwise."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_SPEC = PreTokenizerSpec((_GPT2,))
_SINGLE_DIGITS_SPEC = PreTokenizerSpec((r"\p{N}", _GPT2))
_LLAMA3_SPEC = PreTokenizerSpec((_LLAMA3,), ignore_merges=True, add_bos=True)
# Hugging Face's Qwen2 tokenizer normalises to NFC; llama.cpp does not. The models were trained with it.
_QWEN2_SPEC = PreTokenizerSpec((_QWEN2,), nfc=True)
_DEFAULT_SPEC = PreTokenizerSpec((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "default": _DEFAULT_SPEC,
    "gpt-2": _GPT2_SPEC,
    "smollm": _SINGLE_DIGITS_SPEC,
    "starcoder": _SINGLE_DIGITS_SPEC,
    "llama-bpe": _LLAMA3_SPEC,
    "llama-v3": _LLAMA3_SPEC,
    "llama3": _LLAMA3_SPEC,
    "qwen2": _QWEN2_SPEC,
}
"""Known values of `tokenizer.ggml.pre`; files older than that key are read as `default`, as llama.cpp
does."""
