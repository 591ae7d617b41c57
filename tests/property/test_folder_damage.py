"""Whatever the small files of a model's folder say, they are read or refused with a ModelFileError."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.trained_tokenizers import byte_level, sentencepiece_bpe, splits, unigram

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.front import ModelFront
from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS

DESCRIPTIONS: list[dict[str, Any]] = [
    json.loads(backend.to_str())
    for backend in (byte_level(splits(*PRE_TOKENIZERS["qwen2"].patterns), size=300), sentencepiece_bpe(True), unigram())
]
CONFIG: dict[str, Any] = {
    "bos_token": {"content": "<s>"},
    "eos_token": "</s>",
    "additional_special_tokens": ["<think>"],
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    "add_bos_token": True,
    "tokenizer_class": "LlamaTokenizer",
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}
OTHERS: dict[str, Any] = {
    "generation_config.json": {"eos_token_id": [2, 3]},
    "config.json": {"eos_token_id": 2, "vocab_size": 700, "text_config": {"vocab_size": 3}},
    "special_tokens_map.json": {"unk_token": "<unk>"},
    "added_tokens.json": {},
}
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def paths(value: Any, depth: int = 4) -> list[tuple[Any, ...]]:
    """The places in a JSON value, only the first few of long lists."""
    if depth == 0 or not isinstance(value, dict | list):
        return []
    keys = list(value)[:25] if isinstance(value, dict) else list(range(min(len(value), 4)))
    return [place for key in keys for place in [(key,), *((key, *rest) for rest in paths(value[key], depth - 1))]]


def damaged(data: Any, value: Any) -> Any:
    """A copy with another value in one place, or without it."""
    value = copy.deepcopy(value)
    *outer, last = data.draw(st.sampled_from(paths(value)))
    inside = value
    for key in outer:
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[last] = data.draw(values)
    else:
        del inside[last]
    return value


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(range(len(DESCRIPTIONS))), st.sampled_from(["tokenizer", "config", "others"]))
def test_one_wrong_value_is_lived_with_or_refused(data: Any, which: int, where: str) -> None:
    files: dict[str, Any] = {"tokenizer.json": DESCRIPTIONS[which], "tokenizer_config.json": CONFIG, **OTHERS}
    name = {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json"}.get(where)
    name = name or data.draw(st.sampled_from([n for n in OTHERS if OTHERS[n]]))
    files[name] = damaged(data, files[name])
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        try:
            front = ModelFront.load(folder)
        except ModelFileError as exc:
            assert str(folder) in str(exc) or "chat template" in str(exc)
            return
    ids = front.encode_text("the é 😀 <s>")
    assert all(0 <= i < front.tokenizer.vocab_size for i in ids)
    front.tokenizer.decode(range(front.tokenizer.vocab_size))
