"""A tokenizer from a folder in Hugging Face's form, from the best description that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_files import MIB, read_bytes, read_json, read_text
from swarmd.node.models.folder_settings import FolderSettings
from swarmd.node.models.hf_tokenizer import hf_parts
from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS
from swarmd.node.models.sentencepiece_model import sentencepiece_parts
from swarmd.node.models.tokenizer_parts import TokenizerParts

_MAX_TOKENIZER = 64 * MIB
# Which pre-tokenizer goes with vocab.json and merges.txt: the classes of `transformers` know it by themselves.
_PRE_TOKENIZER_OF_CLASS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2", "GPTNeoXTokenizer": "olmo"}


def folder_parts(folder: Path) -> TokenizerParts:
    """Read `tokenizer.json`; without one `tokenizer.model` (SentencePiece); without that `vocab.json` and
    `merges.txt`. Raises ModelFileError naming the file and what is wrong with it, or what is missing."""
    settings = FolderSettings.read(folder)
    path = folder / "tokenizer.json"
    if (raw := read_json(path, _MAX_TOKENIZER)) is not None:
        return hf_parts(path, raw, settings)
    path = folder / "tokenizer.model"
    if (data := read_bytes(path, _MAX_TOKENIZER)) is not None:
        return sentencepiece_parts(path, data, settings)
    path = folder / "vocab.json"
    vocab = read_json(path, _MAX_TOKENIZER)
    merges = read_text(folder / "merges.txt", _MAX_TOKENIZER)
    if vocab is not None and merges is not None:
        return hf_parts(path, _byte_level_description(path, vocab, merges, settings), settings)
    others = " (tekken.json alone is not enough)" if (folder / "tekken.json").exists() else ""
    raise ModelFileError(
        f"{folder} has no tokenizer.json, tokenizer.model or vocab.json with merges.txt{others}; get the model's "
        "tokenizer.json, or make one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _byte_level_description(path: Path, vocab: dict[str, Any], merges: str, settings: FolderSettings) -> dict[str, Any]:
    """What tokenizer.json would say for the two files of GPT-2 and its kin."""
    name = settings.config.get("tokenizer_class")
    spec = PRE_TOKENIZERS.get(_PRE_TOKENIZER_OF_CLASS.get(str(name).removesuffix("Fast"), ""))
    if spec is None:
        known = ", ".join(_PRE_TOKENIZER_OF_CLASS)
        raise ModelFileError(
            f"{path}: swarmd can't tell how tokenizer class {name!r:.60} cuts words (known: {known}); get the model's "
            "tokenizer.json, or make one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in spec.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if spec.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": lines, "ignore_merges": spec.ignore_merges},
    }
