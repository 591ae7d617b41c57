"""A tokenizer from Hugging Face's `tokenizer.json`.

The file describes the whole of it for the `tokenizers` library
(https://huggingface.co/docs/tokenizers/api/tokenizer), and its normalizer, pre-tokenizer and post-processor are taken
as they are. Changed are only: no truncation, no padding and no dropout; control tokens are matched in the text as it
was given (`normalized` false), because a match after the normalizer could be one that a user's text brought about;
and the guards of `tokenizer_parts`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_settings import FolderSettings
from swarmd.node.models.hf_decoder import spelling_of
from swarmd.node.models.tokenizer_parts import TokenizerParts, careful, guard_encoder
from swarmd.node.models.vocabulary import END_OF_TURN, MAX_TOKENS, TokenType, Vocabulary

# Tokens that frame roles in some models whose files call them ordinary (Command R, DeepSeek Coder); the same that
# llama.cpp's converter (`does_token_look_special`) takes for control tokens.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_AROUND = 16


def hf_parts(path: Path, raw: dict[str, Any], settings: FolderSettings) -> TokenizerParts:
    """Build from `raw`, the content of tokenizer.json at `path`. Raises ModelFileError naming `path` and what is
    damaged or unknown."""
    model_texts = _model_texts(path, raw)
    spelling, byte_fallback = spelling_of(path, raw.get("decoder"))
    added = _added_tokens(path, raw, settings, model_texts)
    described = {
        **raw,
        "truncation": None,
        "padding": None,
        "added_tokens": [_described(entry, entry["special"] or _is_control(entry, settings)) for entry in added],
        "model": {**raw["model"], "dropout": None} if raw["model"].get("type") != "Unigram" else raw["model"],
    }
    encoder = careful(str(path), lambda: tokenizers.Tokenizer.from_str(json.dumps(described)))
    for entry in added:
        if encoder.token_to_id(entry["content"]) != entry["id"]:
            raise ModelFileError(f"{path}: token {entry['content']!r:.40} is not at id {entry['id']}; get another copy")
    vocabulary = _vocabulary(path, encoder, added, settings, byte_fallback)
    careful(str(path), lambda: guard_encoder(encoder, model_texts & {vocabulary.tokens[i] for i in vocabulary.control}))
    prefix, suffix = _around(path, encoder, vocabulary, settings)
    return TokenizerParts(vocabulary, encoder, spelling, prefix, suffix, settings.special_texts)


def _model_texts(path: Path, raw: dict[str, Any]) -> set[str]:
    """The texts of the model's own vocabulary, without the added tokens."""
    model = raw.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in ("BPE", "Unigram"):
        raise ModelFileError(
            f"{path}: tokenizer model {kind!r:.40} is not known to swarmd (known: BPE, Unigram); choose another model"
        )
    vocab = model.get("vocab")
    if kind == "BPE" and isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()):
        return set(vocab)
    if kind == "Unigram" and isinstance(vocab, list) and all(map(_is_scored, vocab)):
        return {entry[0] for entry in vocab}
    raise ModelFileError(f"{path}: the model's vocab has a form that swarmd does not know; get another copy")


def _is_scored(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def _added_tokens(
    path: Path, raw: dict[str, Any], settings: FolderSettings, model_texts: set[str]
) -> list[dict[str, Any]]:
    """The added tokens of all the files, by ascending id. tokenizer.json is right about ids; a token that any file
    calls special is. Named special tokens that only the model knows are added, as `transformers` does."""
    entries = raw.get("added_tokens") or []
    if not isinstance(entries, list):
        raise ModelFileError(f"{path}: added_tokens is no list; get another copy")
    added: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            raise ModelFileError(f"{path}: added_tokens has {entry!r:.60}, which is no token; get another copy")
        added[entry["content"]] = {"special": False, **entry}
    for token_id, token in settings.added.items():
        known = added.get(token.text)
        if known is not None:
            known["special"] = known["special"] is True or token.special
        else:
            added[token.text] = {"id": token_id, "content": token.text, "special": token.special, **token.flags}
    for text in (*settings.special_texts.values(), *settings.extra_specials):
        if text in added:
            added[text]["special"] = True
        elif text in model_texts:
            added[text] = {"id": None, "content": text, "special": True}
    model_ids = _ids_of(raw["model"], {text for text, entry in added.items() if entry["id"] is None})
    for text, token_id in model_ids.items():
        added[text]["id"] = token_id
    return sorted(added.values(), key=lambda entry: entry["id"])


def _ids_of(model: dict[str, Any], texts: set[str]) -> dict[str, int]:
    vocab = model["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((e[0], i) for i, e in enumerate(vocab))
    return {text: token_id for text, token_id in pairs if text in texts}


def _is_control(entry: dict[str, Any], settings: FolderSettings) -> bool:
    text = entry["content"]
    return text in END_OF_TURN or entry["id"] in settings.eos_ids or bool(_LOOKS_SPECIAL.fullmatch(text))


def _described(entry: dict[str, Any], control: bool) -> dict[str, Any]:
    """An added token as tokenizer.json writes it."""
    flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
    normalized = False if control else entry.get("normalized", True)
    return {"id": entry["id"], "content": entry["content"], **flags, "normalized": normalized, "special": control}


def _vocabulary(
    path: Path,
    encoder: tokenizers.Tokenizer,
    added: list[dict[str, Any]],
    settings: FolderSettings,
    byte_fallback: bool,
) -> Vocabulary:
    ids = encoder.get_vocab(with_added_tokens=True)
    size = max(max(ids.values(), default=-1) + 1, settings.vocab_size)
    if not ids or size > MAX_TOKENS:
        raise ModelFileError(f"{path}: the vocabulary is empty or its ids are above {MAX_TOKENS}; get another copy")
    tokens, types = [""] * size, [int(TokenType.UNUSED)] * size
    for text, token_id in ids.items():
        tokens[token_id] = text
        types[token_id] = TokenType.BYTE if byte_fallback and _BYTE.fullmatch(text) else TokenType.NORMAL
    shown: list[int] = []
    for entry in added:
        control = entry["special"] or _is_control(entry, settings)
        types[entry["id"]] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        if not entry["special"]:
            shown.append(entry["id"])
    named = {name: ids.get(settings.special_texts.get(f"{name}_token", "")) for name in ("bos", "eos", "unk")}
    return Vocabulary.build(
        tokens,
        types,
        bos_id=named["bos"],
        eos_id=named["eos"],
        unknown_id=named["unk"],
        ends=(i for i in settings.eos_ids if i < size),
        shown=shown,
    )


def _around(
    path: Path, encoder: tokenizers.Tokenizer, vocabulary: Vocabulary, settings: FolderSettings
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that go before and behind a text: what the post-processor puts there. Where it puts nothing (DeepSeek),
    the Llama classes of `transformers` follow `add_bos_token` and `add_eos_token`."""
    plain, full = careful(
        str(path), lambda: [encoder.encode("a", add_special_tokens=special).ids for special in (False, True)]
    )
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), len(full))
    prefix, suffix = tuple(full[:start]), tuple(full[start + len(plain) :])
    if len(prefix) + len(suffix) > _MAX_AROUND or any(i >= len(vocabulary.tokens) for i in (*prefix, *suffix)):
        raise ModelFileError(f"{path}: the post_processor adds tokens that can't be right; get another copy")
    if not prefix and not suffix and str(settings.config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        prefix = (vocabulary.bos_id,) if settings.add_bos and vocabulary.bos_id is not None else ()
        suffix = (vocabulary.eos_id,) if settings.add_eos and vocabulary.eos_id is not None else ()
    return prefix, suffix
