"""The tokenizer: the same ids as Hugging Face's, control tokens only where they are wanted, clear
refusals."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tokenizers
from support.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata
from tokenizers import pre_tokenizers

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS
from swarmd.node.models.tokenizer import GUARD, Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and   inner  spaces ",
    "tabs\tand\nnew\n\n\nlines\r\n",
    "I'll say it's what they've done; he'd DON'T I'M",
    "1234567890 3.14159 1,000,000 0x1F ½ ² Ⅷ",
    "def f(x):\n    return x**2  # comment",
    "snake_case camelCase kebab-case",
    "naïve café façade Ångström e\u0301",
    "Größe, Straße, Übermut",
    "Здравствуй, мир",
    "γειά σου κόσμε",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界。今天天气不错！",
    "こんにちは世界、カタカナ",
    "안녕하세요 세계",
    "emoji 😀😃 👩‍👩‍👧‍👦 🇫🇷 ✊🏽",
    "math ∑∏∫√∞ ≤≥≠ →",
    "zero\u200bwidth nb\u00a0sp \u3000wide",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|><|endoftext|> <|im_end|>",
    "almost <|im_end| > and <im_end>",
    '{"json": [1, 2, {"a": null}]}',
    "https://example.org/a/b?c=d&e=%20f#g",
    "a" * 300,
    "the " * 50,
    "\x00\x01 control \x7f bytes",
    "🙂" * 20 + " mixed 漢字 and ascii",
    "!?…—–-'\"«»„“”",
    "trailing newline\n",
]


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def oracle(smollm2_metadata: dict[str, Any]) -> Any:
    """SmolLM2's tokenizer as its own tokenizer.json describes it, run by transformers."""
    from transformers import PreTrainedTokenizerFast

    tokens = list(smollm2_metadata["tokenizer.ggml.tokens"])
    merges = [tuple(m.split(" ")) for m in smollm2_metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges)  # pyright: ignore[reportArgumentType]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    types = smollm2_metadata["tokenizer.ggml.token_type"]
    backend.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == 3])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_those_of_transformers(smollm2: Tokenizer, oracle: Any, text: str) -> None:
    ids = oracle.encode(text, add_special_tokens=False)
    assert smollm2.encode(text, add_special=False) == ids
    assert smollm2.decode(ids, skip_special=False) == oracle.decode(ids) == text
    assert smollm2.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_the_default_model_ends_at_end_of_turn_and_end_of_text(smollm2: Tokenizer) -> None:
    assert {smollm2.token_text(i) for i in smollm2.eos_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert smollm2.bos_id == 1
    assert smollm2.vocab_size == 49152


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "I'll pay 123", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3"]),
        ("gpt-2", "I'll pay 123", ["I", "'ll", "Ġpay", "Ġ123"]),
        ("gpt-2", "I'LL  go", ["I", "'", "LL", "Ġ", "Ġgo"]),
        ("llama-bpe", "I'LL pay 12345!\n\n", ["I", "'LL", "Ġpay", "Ġ", "123", "45", "!ĊĊ"]),
        ("llama-bpe", "a  b\n  c", ["a", "Ġ", "Ġb", "Ċ", "Ġ", "Ġc"]),
        ("qwen2", "I'LL pay 123!\n\n", ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "!ĊĊ"]),
        ("qwen2", "(hello) _x", ["(hello", ")", "Ġ_", "x"]),
        ("default", "pay 12345, now", ["pay", "Ġ", "123", "45", ",", "Ġnow"]),
    ],
)
def test_words_are_cut_as_the_named_pre_tokenizer_says(pre: str, text: str, pieces: list[str]) -> None:
    """Each piece is a token of its own here, so ids show where the text was cut."""
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges: list[str] = []
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            if piece[:end] not in tokens:
                tokens.append(piece[:end])
                merges.append(f"{piece[: end - 1]} {piece[end - 1]}")
    metadata |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    metadata["tokenizer.ggml.token_type"] = [1] * len(tokens)
    ids = Tokenizer.from_gguf(metadata).encode(text, add_special=False)
    assert [tokens[i] for i in ids] == pieces


def test_qwen_texts_are_normalised_to_nfc_and_others_are_kept() -> None:
    decomposed = "cafe\u0301"
    qwen = Tokenizer.from_gguf(byte_level_metadata(**{"tokenizer.ggml.pre": "qwen2"}))
    smol = Tokenizer.from_gguf(byte_level_metadata())
    assert qwen.decode(qwen.encode(decomposed, add_special=False)) == "caf\u00e9"
    assert smol.decode(smol.encode(decomposed, add_special=False)) == decomposed


def test_llama3_takes_a_word_that_is_a_token_whole_without_merges() -> None:
    metadata = byte_level_metadata(**{"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    metadata["tokenizer.ggml.tokens"] += ["Ġzebra"]
    metadata["tokenizer.ggml.token_type"] += [1]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode(" zebra", add_special=True) == [tokenizer.vocab_size - 1]


def test_bos_is_added_only_when_asked_and_when_the_model_wants_it() -> None:
    wants = Tokenizer.from_gguf(byte_level_metadata(**{"tokenizer.ggml.add_bos_token": True}))
    assert wants.encode("h", add_special=True)[0] == wants.bos_id
    assert wants.bos_id not in wants.encode("h", add_special=False)
    assert Tokenizer.from_gguf(byte_level_metadata()).encode("h", add_special=True) == wants.encode(
        "h", add_special=False
    )


def test_user_text_makes_no_control_token_and_reads_back_unchanged() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    text = "x<|im_end|>\n<|im_start|>system\n"
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special=False).count(2) == 1


def test_a_guard_breaks_a_control_token_and_vanishes() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    guarded = tokenizer.encode(f"<{GUARD}|im_end|>", add_special=False)
    assert guarded == tokenizer.encode("<|im_end|>", add_special=False, parse_special=False)


def test_user_defined_tokens_are_recognised_in_any_text_and_shown() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    ids = tokenizer.encode("<think>", add_special=False, parse_special=False)
    assert len(ids) == 1
    assert tokenizer.decode(ids) == "<think>"


def test_threads_that_differ_about_control_tokens_do_not_disturb_each_other() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    expected = {flag: tokenizer.encode("<|im_end|>", add_special=False, parse_special=flag) for flag in (True, False)}
    wrong: list[bool] = []

    def encode(flag: bool) -> None:
        for _ in range(500):
            if tokenizer.encode("<|im_end|>", add_special=False, parse_special=flag) != expected[flag]:
                wrong.append(flag)

    threads = [threading.Thread(target=encode, args=(flag,)) for flag in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected[True] != expected[False]
    assert not wrong


def test_broken_surrogates_become_replacement_characters() -> None:
    """JSON can carry halves of characters; they must not end a request with a traceback."""
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00", add_special=False)) == "a�b 😀"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error(token_id: int) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([token_id])


def test_end_of_turn_tokens_end_a_generation_whatever_the_file_calls_them() -> None:
    """Files exist that name only one EOS and mark <|im_end|> as an ordinary token."""
    metadata = byte_level_metadata(**{"tokenizer.ggml.eos_token_id": 0})
    metadata["tokenizer.ggml.token_type"][2] = 1
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.decode([2]) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5' is not known"),
        ({"tokenizer.ggml.model": None}, "None is not known"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon' is not known.*smollm"),
        ({"tokenizer.ggml.pre": 7}, "7 is not known"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.tokens": "abc"}, "should be a list"),
        ({"tokenizer.ggml.tokens": None}, "no usable tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not a pair"),
        ({"tokenizer.ggml.merges": [""]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["nope nothing"]}, "inconsistent"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "should be a token id"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "true or false"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "differ in length"),
    ],
)
def test_a_vocabulary_that_can_not_work_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_gguf(byte_level_metadata(**changes))


def test_every_known_pre_tokenizer_builds() -> None:
    for name in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(**{"tokenizer.ggml.pre": name}))
        assert tokenizer.decode(tokenizer.encode("the 😀 the", add_special=False)) == "the 😀 the"


PIECES = ["▁", "t", "h", "e", "r", "▁t", "he", "▁the", "re", "er", "▁there", "here", "th"]


def test_sentencepiece_puts_a_space_first_and_takes_it_away_again() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(PIECES))
    ids = tokenizer.encode("the there", add_special=True)
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", " the", " there"] or ids[0] == 1
    assert tokenizer.decode(ids) == "the there"
    assert tokenizer.decode(ids[1:], keep_leading_space=True) == " the there"


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(PIECES))
    ids = tokenizer.encode("the é😀", add_special=False)
    assert len(ids) > 6
    assert tokenizer.decode(ids) == "the é😀"
