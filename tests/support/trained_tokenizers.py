"""Small tokenizers trained on the spot, written as Hugging Face folders and as GGUF metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import tokenizers
from support.hard_texts import PLAIN
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import generate_merges

CONTROL = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
USER_DEFINED = ("<think>", "</think>", "    ")
CORPUS = [*PLAIN, *(" ".join(PLAIN[i::3]) for i in range(3)), "the there then " * 40, "12 123 1234 " * 9, "   \n\n" * 9]


def byte_level(pre: Any, normalizer: Any = None, *, ignore_merges: bool = False, size: int = 700) -> Any:
    """A byte-level BPE tokenizer with `pre`, in the form of the models' own tokenizer.json files."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size,
            show_progress=False,
            special_tokens=list(CONTROL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in USER_DEFINED])
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return backend


def splits(*patterns: str) -> Any:
    """Pre-tokenizer: cut by each pattern in turn, then the byte alphabet."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level_gguf(backend: Any, pre: str) -> dict[str, Any]:
    """`backend` as a GGUF file's metadata describes it."""
    described = json.loads(backend.to_str())
    ids = backend.get_vocab(with_added_tokens=True)
    added = {entry["content"]: entry["special"] for entry in described["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1 if t not in added else 3 if added[t] else 4 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def write_folder(folder: Path, backend: Any, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_pieces() -> list[tuple[str, float]]:
    """Pieces and scores of a small SentencePiece BPE vocabulary, to stand after the three control pieces and the 256
    bytes. Runs of spaces all have the same score, the lowest, as in Llama's and Mistral's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    text = [line for line in CORPUS if "あ" not in line]
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, show_progress=False, max_token_length=8))
    ids = backend.get_vocab()
    pieces = sorted(ids, key=ids.__getitem__)
    merged = [p for p in pieces if len(p) > 1 and p.strip("▁")]
    ranked = [*merged, *(p for p in pieces if len(p) == 1 and p not in "😀😃漢")]
    return [("▁" * n, -1e9) for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)] + [
        (piece, -float(i)) for i, piece in enumerate(ranked)
    ]


SPECIAL_PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)))


def sentencepiece_bpe(prefix_space: bool) -> Any:
    """Llama 2's or Gemma's form of tokenizer.json for `sentencepiece_pieces`, with the merges that `transformers`'
    converter derives from the scores."""
    scores = dict(sentencepiece_pieces())
    merges = generate_merges({piece: i for i, piece in enumerate(scores)}, scores)
    vocab = {text: i for i, text in enumerate([*SPECIAL_PIECES, *scores])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend: list[Any] = [normalizers.Prepend("▁")] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL_PIECES[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def sentencepiece_gguf(prefix_space: bool) -> dict[str, Any]:
    """The vocabulary of `sentencepiece_bpe` as GGUF metadata."""
    pieces = sentencepiece_pieces()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*SPECIAL_PIECES, *(text for text, _ in pieces)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + [score for _, score in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix_space,
    }


def unigram() -> Any:
    """A Unigram tokenizer with byte fallback; its model knows its control tokens as pieces."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)  # pyright: ignore[reportAttributeAccessIssue]
    backend.train_from_iterator(
        [line for line in CORPUS if "あ" not in line],
        trainers.UnigramTrainer(
            vocab_size=400, show_progress=False, special_tokens=list(SPECIAL_PIECES), unk_token="<unk>"
        ),
    )
    described = json.loads(backend.to_str())
    described["model"]["byte_fallback"] = True
    described["added_tokens"] = [e for e in described["added_tokens"] if e["id"] < 3]
    described["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        ],
    }
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def model_proto(
    pieces: list[tuple[str, float, int]], kind: int, *, dummy_prefix: bool, squeeze: bool = False, charsmap: bytes = b""
) -> bytes:
    """A SentencePiece file: (text, score, type) of each piece, and the few settings that matter here."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    def field(number: int, value: int | bytes | float) -> bytes:
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    body = b"".join(field(1, field(1, t.encode()) + field(2, score) + field(3, k)) for t, score, k in pieces)
    trainer = field(3, kind) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    normalizer = field(2, charsmap) + field(3, int(dummy_prefix)) + field(4, int(squeeze)) + field(5, 1)
    return body + field(2, trainer) + field(3, normalizer)
