r"""How text is cut into words before byte-pair merging: one entry per value of `tokenizer.ggml.pre`.

The expressions are those of the models' own `tokenizer.json` files. llama.cpp's `src/llama-vocab.cpp`
(`llm_tokenizer_bpe`; https://github.com/ggml-org/llama.cpp) quotes many of them beside the forms that it adapted to
its own matcher, and maps the names to them in `llama_vocab::impl::load`. Where llama.cpp and the model's file differ,
the file is followed, because the model was trained on it:

- NFC normalisation, which llama.cpp leaves out: Qwen, Command R, GPT-NeoX and its kin (OLMo 1, MPT), as
  `transformers` has it in `models/{qwen2,qwen3_5,cohere,gpt_neox}/tokenization_*.py`;
- DeepSeek's first models cut numbers into single digits (`Digits(individual_digits=True)`), not into runs;
- Granite 4's ("granite-docling") cuts as GPT-4 does, with numbers of up to three digits, not as GPT-2 does;
- Smaug and SmolLM3 have Llama 3's vocabulary, whose words of one token are taken whole (`ignore_merges`).

Each expression cuts the pieces that the one before it left; text between two matches is a piece of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizerSpec(NamedTuple):
    """`patterns` in the order they cut; `nfc`: text is NFC-normalised first; `ignore_merges`: a word that is
    itself a token is taken whole, whatever the merges say; `add_bos`: a BOS token starts a text unless the
    metadata says otherwise."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED_CODER = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# Words of tiktoken's o200k_base: capitals, then small letters, then an English ending.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_START}[{_UPPER}]*[{_LOWER}]+%s|{_START}[{_UPPER}]+[{_LOWER}]*%s"
_O200K = _CASED.replace("%s", _SHORT + "?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = _CASED.replace("%s", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
# `tokenization_kimi.py` of Moonlight and Kimi K2: Chinese stands alone.
_NOT_HAN = (
    _CASED.replace("%s", _SHORT + "?")
    .replace(f"[{_UPPER}]", rf"[{_UPPER}&&[^\p{{Han}}]]")
    .replace(f"[{_LOWER}]", rf"[{_LOWER}&&[^\p{{Han}}]]")
)
_KIMI = rf"[\p{{Han}}]+|{_NOT_HAN}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"

# The cased letters of DeepSeek LLM's tokenizer.json, as code points.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
_DEEPSEEK_LETTERS = "".join("-".join(f"\\x{{{point}}}" for point in span.split("-")) for span in _CASED_LETTERS.split())
_DEEPSEEK_MARKS = r"!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}"
_DEEPSEEK_ASIAN = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)

_GPT2_SPEC = PreTokenizerSpec((_GPT2,))
_GPT_NEOX_SPEC = PreTokenizerSpec((_GPT2,), nfc=True)
_SINGLE_DIGITS_SPEC = PreTokenizerSpec((r"\p{N}", _GPT2))
_LLAMA3_SPEC = PreTokenizerSpec((_LLAMA3,), ignore_merges=True, add_bos=True)
_GPT4_SPEC = PreTokenizerSpec((_LLAMA3,))
_QWEN2_SPEC = PreTokenizerSpec((_QWEN2,), nfc=True)
_O200K_SPEC = PreTokenizerSpec((_O200K,))
_DEEPSEEK_V3_SPEC = PreTokenizerSpec(_DEEPSEEK_V3)

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "default": PreTokenizerSpec((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_SPEC,
    "phi-2": _GPT2_SPEC,
    "olmo": _GPT_NEOX_SPEC,
    "mpt": _GPT_NEOX_SPEC,
    "smollm": _SINGLE_DIGITS_SPEC,  # SmolLM 1 and 2
    "starcoder": _SINGLE_DIGITS_SPEC,
    "refact": _SINGLE_DIGITS_SPEC,  # Granite up to 3.3
    "codeshell": _SINGLE_DIGITS_SPEC,
    "command-r": PreTokenizerSpec((r"\p{N}", _GPT2), nfc=True),
    "llama-bpe": _LLAMA3_SPEC,
    "llama-v3": _LLAMA3_SPEC,
    "llama3": _LLAMA3_SPEC,
    "falcon3": _LLAMA3_SPEC,
    "falcon-h1": _LLAMA3_SPEC,
    "pixtral": _LLAMA3_SPEC,
    "lfm2": _LLAMA3_SPEC,
    "smaug-bpe": PreTokenizerSpec((_LLAMA3,), ignore_merges=True),
    "dbrx": _GPT4_SPEC,  # OLMo 2, Phi-4
    "granite-docling": _GPT4_SPEC,
    "chatglm-bpe": _GPT4_SPEC,
    "glm4": _GPT4_SPEC,
    "qwen2": _QWEN2_SPEC,  # Qwen 1.5 to 3
    "deepseek-r1-qwen": _QWEN2_SPEC,
    "megrez": _QWEN2_SPEC,
    "qwen35": PreTokenizerSpec((_QWEN35,), nfc=True),
    "stablelm2": PreTokenizerSpec((_QWEN2,)),
    "hunyuan": PreTokenizerSpec((_QWEN2,)),
    "grok-2": PreTokenizerSpec((_QWEN2,)),
    "tekken": PreTokenizerSpec((_TEKKEN,), ignore_merges=True, add_bos=True),  # Mistral from Nemo on
    "gpt-4o": _O200K_SPEC,  # gpt-oss, Phi-4-mini
    "llama4": _O200K_SPEC,
    "minimax-m2": _O200K_SPEC,
    "deepseek-llm": PreTokenizerSpec(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            rf"\s?[{_DEEPSEEK_MARKS}]+",
            r"\s+$",
            _DEEPSEEK_ASIAN,
            r"\p{N}",
        )
    ),
    "deepseek-coder": PreTokenizerSpec((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}")),
    "deepseek-v3": _DEEPSEEK_V3_SPEC,  # V3, R1
    "hunyuan-dense": _DEEPSEEK_V3_SPEC,
    "kimi-k2": PreTokenizerSpec((_KIMI,)),
    "seed-coder": PreTokenizerSpec((_SEED_CODER,)),
    "bailingmoe": PreTokenizerSpec((_BAILING,)),
}
"""Known values of `tokenizer.ggml.pre`; files older than that key are read as `default`, as llama.cpp
does."""
