"""Folders in Hugging Face's form: what their files say is done, nothing of a user's text acts, damage has a name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.trained_tokenizers import (
    byte_level,
    sentencepiece_bpe,
    sentencepiece_gguf,
    splits,
    unigram,
    write_folder,
)
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.front import ModelFront
from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS
from swarmd.node.models.tokenizer import GUARD, Tokenizer

CONFIG = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


def small(**changes: Any) -> Any:
    return byte_level(splits(*PRE_TOKENIZERS["llama-bpe"].patterns), **changes)


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def changed(folder: Path, **changes: Any) -> Path:
    """The folder with top-level keys of its tokenizer.json replaced."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    put(folder, "tokenizer.json", {**raw, **changes})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", small(), **CONFIG)


def test_the_ids_that_end_a_generation_come_from_all_files(folder: Path) -> None:
    put(folder, "generation_config.json", {"eos_token_id": [3, 200]})
    put(folder, "config.json", {"eos_token_id": 201, "text_config": {"eos_token_id": [202]}, "vocab_size": 1000})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {2, 3, 200, 201, 202}
    assert tokenizer.bos_id == 0
    assert tokenizer.special_texts == CONFIG
    assert {tokenizer.token_bytes(i) for i in range(900, 1000)} == {b""}  # rows of the embedding without a token
    assert tokenizer.vocab_size == 1000


def test_end_of_turn_tokens_end_a_generation_though_no_file_says_so(tmp_path: Path) -> None:
    backend = small()
    backend.add_tokens([AddedToken("<end_of_turn>", special=False), AddedToken("<|eot_id|>", special=False)])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model", backend))
    assert {tokenizer.token_text(i) for i in tokenizer.eos_ids} == {"<end_of_turn>", "<|eot_id|>", "<|im_end|>"}
    ids = tokenizer.encode("x<end_of_turn>", add_special=False)
    assert tokenizer.decode(ids) == "x"
    assert not tokenizer.eos_ids & set(tokenizer.encode("<end_of_turn>", add_special=False, parse_special=False))


def test_the_end_of_a_message_is_no_end_of_a_turn_where_both_are_known(tmp_path: Path) -> None:
    """gpt-oss."""
    backend = small()
    backend.add_special_tokens(["<|return|>", "<|call|>", "<|end|>"])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model", backend))
    assert {tokenizer.token_text(i) for i in tokenizer.eos_ids} == {"<|return|>", "<|call|>", "<|im_end|>"}


@pytest.mark.parametrize("make", [small, lambda: sentencepiece_bpe(True), lambda: sentencepiece_bpe(False), unigram])
def test_user_text_makes_no_control_token_and_reads_back_unchanged(make: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model", make(), unk_token="<unk>"))
    control = {i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) in tokenizer.control_texts}
    assert len(control) >= 3
    for text in (*tokenizer.control_texts, "x" + "".join(tokenizer.control_texts) + " y", "<<s>s></s></s> <s>"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert not control & set(ids)
        assert tokenizer.decode(ids) == text
        guarded = text[0] + GUARD + text[1:]
        if text in tokenizer.control_texts:
            assert tokenizer.encode(guarded, add_special=False) == ids


@pytest.mark.parametrize("normalized", [True, False])
def test_a_normalizer_brings_no_control_token_about(normalized: bool, tmp_path: Path) -> None:
    """Full-width brackets become plain ones, after control tokens were looked for."""
    backend = byte_level(splits(*PRE_TOKENIZERS["qwen2"].patterns), normalizers.NFKC())
    backend.add_tokens([AddedToken("<end>", special=True, normalized=normalized)])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model", backend))
    end = tokenizer.encode("<end>", add_special=False)
    assert len(end) == 1
    assert end[0] not in tokenizer.encode("＜end＞", add_special=False)
    assert end[0] not in tokenizer.encode(f"<{GUARD}end>", add_special=False)


def test_words_that_are_control_tokens_are_not_taken_whole(tmp_path: Path) -> None:
    """With `ignore_merges` a word that is a token is taken whole: "zzend" is both here."""
    described = json.loads(small(ignore_merges=True).to_str())
    end_id = len(described["model"]["vocab"])
    described["model"]["vocab"]["zzend"] = end_id
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    described["added_tokens"] = [{"id": end_id, "content": "zzend", "special": True, **flags}]
    folder = write_folder(tmp_path / "model", small())
    put(folder, "tokenizer.json", described)
    tokenizer = Tokenizer.from_folder(folder)
    end = tokenizer.encode("zzend", add_special=False)
    assert len(end) == 1
    ids = tokenizer.encode("zzend", add_special=False, parse_special=False)
    assert end[0] not in ids
    assert tokenizer.decode(ids) == "zzend"


def test_role_tokens_that_a_file_calls_ordinary_are_guarded_but_shown(tmp_path: Path) -> None:
    """Command R's."""
    backend = small()
    backend.add_tokens([AddedToken("<|USER_TOKEN|>", normalized=False)])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model", backend))
    ids = tokenizer.encode("<|USER_TOKEN|>", add_special=False)
    assert len(ids) == 1
    assert tokenizer.decode(ids) == "<|USER_TOKEN|>"
    assert not set(ids) & set(tokenizer.encode("<|USER_TOKEN|>", add_special=False, parse_special=False))


def test_what_goes_around_a_text_is_the_post_processors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", small(), **CONFIG, add_bos_token=False, add_eos_token=True)
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("the", add_special=False)
    assert tokenizer.encode("the", add_special=True) == [0, *plain]
    assert PreTrainedTokenizerFast.from_pretrained(folder).encode("the") == [0, *plain]


def test_llamas_class_adds_what_the_post_processor_leaves_out(folder: Path) -> None:
    """DeepSeek's."""
    changed(folder, post_processor=None)
    for settings, before, behind in (({}, [], []), ({"add_bos_token": True, "add_eos_token": True}, [0], [2])):
        put(folder, "tokenizer_config.json", {**CONFIG, **settings, "tokenizer_class": "LlamaTokenizerFast"})
        tokenizer = Tokenizer.from_folder(folder)
        plain = tokenizer.encode("the", add_special=False)
        assert tokenizer.encode("the", add_special=True) == [*before, *plain, *behind]


def test_tokens_that_only_the_configuration_adds(tmp_path: Path) -> None:
    backend = small()
    size = backend.get_vocab_size()
    entry = {"content": "<|tool|>", "special": True, "normalized": False, "rstrip": True}
    plain = {"content": "<note>", "special": False, "normalized": False}
    added = {str(size): {**entry, "lstrip": False, "single_word": False}, str(size + 1): plain}
    folder = write_folder(tmp_path / "model", backend, added_tokens_decoder=added, **CONFIG)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    text = "a<|tool|>  \n b<note> c"
    ids = theirs.encode(text, add_special_tokens=False)
    assert {size, size + 1} < set(ids)
    assert ours.encode(text, add_special=False) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    put(folder, "tokenizer_config.json", {**CONFIG, "added_tokens_decoder": {str(size + 5): entry}})
    with pytest.raises(ModelFileError, match=f"'<|tool|>' is not at id {size + 5}"):
        Tokenizer.from_folder(folder)


def test_special_tokens_by_name_alone_are_control_tokens(folder: Path) -> None:
    config = {**CONFIG, "additional_special_tokens": ["<think>"], "extra_special_tokens": {"image_token": "</think>"}}
    put(folder, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert {"<think>", "</think>"} <= tokenizer.control_texts
    assert tokenizer.special_texts["image_token"] == "</think>"
    (folder / "tokenizer_config.json").unlink()
    put(folder, "special_tokens_map.json", {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|pad|>"})
    assert Tokenizer.from_folder(folder).special_texts == {"bos_token": "<|bos|>", "eos_token": "<|pad|>"}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
def test_vocab_and_merges_without_a_tokenizer_json(name: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    pre = {"GPT2Tokenizer": "gpt-2", "Qwen2TokenizerFast": "qwen2"}[name]
    backend = byte_level(splits(*PRE_TOKENIZERS[pre].patterns))
    whole = write_folder(tmp_path / "whole", backend, add_bos_token=False, **CONFIG)
    described = json.loads(backend.to_str())
    parts = tmp_path / "parts"
    parts.mkdir()
    put(parts, "vocab.json", described["model"]["vocab"])
    put(parts, "merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, described["model"]["merges"])) + "\n")
    added = {e["id"]: e["content"] for e in described["added_tokens"] if not e["special"]}
    put(parts, "added_tokens.json", {text: token_id for token_id, text in added.items()})
    put(parts, "tokenizer_config.json", {"tokenizer_class": name, **CONFIG})
    first, second = Tokenizer.from_folder(whole), Tokenizer.from_folder(parts)
    for text in ("I'll pay 123", "the\n\n thére <think>x</think><|im_end|>", "# version"):
        assert first.encode(text, add_special=False) == second.encode(text, add_special=False)
    proves("tokenizers", "byte-level BPE", "other", "works", case=name)
    put(parts, "tokenizer_config.json", {"tokenizer_class": "XTokenizer"})
    with pytest.raises(ModelFileError, match=r"XTokenizer.*tokenizer\.json"):
        Tokenizer.from_folder(parts)


DAMAGE: list[tuple[str, Any, str]] = [
    ("tokenizer.json", "{", r"tokenizer\.json is not valid JSON"),
    ("tokenizer.json", "[" * 100_000, r"tokenizer\.json is not valid JSON"),
    ("tokenizer.json", [1], r"tokenizer\.json should hold a JSON object"),
    ("tokenizer.json", {}, r"tokenizer model None is not known"),
    ("tokenizer.json", {"model": {"type": "WordPiece"}}, r"'WordPiece' is not known to swarmd \(known: BPE, Unigram\)"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}, "a form that swarmd does not know"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "decoder None is not known"),
    ("tokenizer_config.json", "\xff", r"tokenizer_config\.json is not valid JSON"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token should be true or false"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "'x', which is no token"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {}}}, "which is no token"),
    ("added_tokens.json", {"x": -1}, r"added_tokens\.json: 'x' has -1"),
    ("config.json", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    ("generation_config.json", "nope", r"generation_config\.json is not valid JSON"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE)
def test_a_damaged_file_is_refused_by_name(folder: Path, name: str, content: Any, message: str) -> None:
    put(folder, name, content)
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder 'WordPiece'"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}}, "decoder 'Strip'"),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}}, "decoder 'Replace'"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]}}, "ByteLevel"),
        ({"added_tokens": {"a": 1}}, "added_tokens is no list"),
        ({"added_tokens": [{"content": "x"}]}, "which is no token"),
        ({"added_tokens": [{"id": 9999, "content": "<x>"}]}, "'<x>' is not at id 9999"),
        ({"normalizer": {"type": "Wrong"}}, "is inconsistent"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}}, "is inconsistent"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "is inconsistent"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, "added_tokens": []}, "ids are above"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "is inconsistent"),
    ],
)
def test_an_inconsistent_tokenizer_json_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_folder(changed(folder, **changes))
    assert "tokenizer.json" in str(caught.value)


def test_a_post_processor_that_adds_what_can_not_be_is_refused(folder: Path) -> None:
    special = {"<|bos|>": {"id": "<|bos|>", "ids": [10**6], "tokens": ["<|bos|>"]}}
    single = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    wrong = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    with pytest.raises(ModelFileError, match="post_processor adds tokens that can't be right"):
        Tokenizer.from_folder(changed(folder, post_processor=wrong))


def test_files_larger_than_such_files_are_are_not_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(65 << 20)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is larger than 64 MiB"):
        Tokenizer.from_folder(folder)


def test_a_folder_without_a_tokenizer_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no tokenizer\.json, tokenizer\.model or vocab\.json"):
        ModelFront.load(tmp_path)
    put(tmp_path, "tekken.json", {})
    with pytest.raises(ModelFileError, match=r"tekken\.json alone is not enough"):
        ModelFront.load(tmp_path)


def test_truncation_padding_and_dropout_of_the_file_do_nothing(folder: Path) -> None:
    before = Tokenizer.from_folder(folder).encode("the there then " * 9, add_special=False)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["dropout"] = 0.9
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 512},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    put(folder, "tokenizer.json", raw)
    assert Tokenizer.from_folder(folder).encode("the there then " * 9, add_special=False) == before


def test_phi3s_role_tokens_swallow_the_space_behind_them(tmp_path: Path) -> None:
    """In tokenizer.json by a flag; GGUF has none, so its architecture says it."""
    gguf = sentencepiece_gguf(True)
    backend = sentencepiece_bpe(True)
    for text in ("<|user|>", "<|end|>", "<|endoftext|>"):
        backend.add_tokens([AddedToken(text, special=True, normalized=False, rstrip=text != "<|endoftext|>")])
        gguf["tokenizer.ggml.tokens"].append(text)
        gguf["tokenizer.ggml.token_type"].append(3)
        gguf["tokenizer.ggml.scores"].append(0.0)
    gguf["general.architecture"] = "phi3"
    folder = write_folder(tmp_path / "model", backend, unk_token="<unk>")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("<|user|>\nthe<|end|>\n<|user|>  x", "<|endoftext|> a <|end|>", "<s> a<|user|> \n "):
        ids = theirs.encode(text, add_special_tokens=False)
        assert Tokenizer.from_folder(folder).encode(text, add_special=False) == ids
        assert Tokenizer.from_gguf(gguf).encode(text, add_special=False) == ids


def test_a_metaspace_model_without_byte_tokens(tmp_path: Path) -> None:
    described = json.loads(unigram().to_str())
    described["model"]["byte_fallback"] = False
    described["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    folder = write_folder(tmp_path / "model", unigram(), unk_token="<unk>")
    put(folder, "tokenizer.json", described)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("the there", add_special=False)) == "the there"
