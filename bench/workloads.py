"""What the lab serves: model files, how many bytes of them a token needs, and the prompts that fit them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader
from load import PromptSource

from swarmd.node.models.catalog import DEFAULT_MODEL
from swarmd.node.models.front import ModelFront
from swarmd.node.models.store import ModelStore


@dataclass(frozen=True)
class BenchModel:
    """A model file and what the lab must know of it. `decode_bytes`: bytes of weights read for one decoded token."""

    name: str
    path: Path
    vocabulary: int
    ends: tuple[int, ...]
    decode_bytes: int

    @classmethod
    def open(cls, name: str, path: Path) -> BenchModel:
        """Read the header of a GGUF file."""
        tokenizer = ModelFront.load(path).tokenizer
        ends = tuple(sorted(tokenizer.eos_ids))
        return cls(name, path, tokenizer.vocab_size, ends, decode_bytes(path))

    def prompt_source(self, seed: int = 512) -> PromptSource:
        """Random prompts for this model's vocabulary."""
        return PromptSource(self.vocabulary, self.ends, seed)


def decode_bytes(path: Path) -> int:
    """Bytes of weights that one decoded token must read: all, but of an untied embedding only a row.

    A tied embedding is read whole, as the head.
    """
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    tied = "output.weight" not in sizes
    return sum(sizes.values()) - (0 if tied else sizes["token_embd.weight"])


def cache_folder() -> Path:
    """Where the lab keeps what is expensive to make."""
    return _cache() / "swarmd-bench"


def default_model() -> Path:
    """The default model's file: SWARMD_TEST_MODEL, or the tests' cache, filled when it is empty."""
    if given := os.environ.get("SWARMD_TEST_MODEL"):
        return Path(given)
    store = ModelStore(_cache() / "swarmd-tests" / "models")
    return asyncio.run(store.ensure(DEFAULT_MODEL, lambda progress: None)).path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
