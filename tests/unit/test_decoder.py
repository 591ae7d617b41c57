"""The decoder against `transformers`, in fp32, on random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.llama_oracle import tiny_oracle
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.backends.base import RowSpan
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.decoder import Decoder
from swarmd.node.engine.kv_cache import KvCache
from swarmd.node.engine.weights import load_stage_weights
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.errors import ModelFileError

MODELS = {
    "fp32": TinyModel(),
    "Q4_1 and Q8_0": TinyModel(type=Type.Q4_1, types={"token_embd": Type.Q8_0}),
    "Q5_0, untied": TinyModel(type=Type.Q5_0, tied=False),
    "BF16, all heads their own keys": TinyModel(type=Type.BF16, n_kv_heads=4),
    "one key head, rope factors": TinyModel(n_kv_heads=1, rope_factors=True),
}
PROMPT = 13
STEPS = 8


class Model:
    """The decoder of a whole file with one sequence."""

    def __init__(self, path: Path) -> None:
        torch.set_grad_enabled(False)
        backend = TorchCpuBackend()
        with open_checkpoint(path) as file:
            spec = file.spec
            weights = load_stage_weights(file, 0, spec.n_layers, backend)
        self.decoder = Decoder(spec, 0, weights, backend)
        self.cache = KvCache(backend, spec.n_layers, spec.cache, 64)
        self.cache.open(0)

    def append(self, tokens: list[int]) -> torch.Tensor:
        """Logits of all these tokens' positions."""
        start = self.cache.length(0)
        self.cache.reserve({0: start + len(tokens)})
        span = RowSpan(0, len(tokens), start)
        x = self.decoder.forward(self.decoder.embed(tokens), [span], [self.cache.layers(0)])
        self.cache.commit(0, start + len(tokens))
        return torch.from_numpy(self.decoder.head(x))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_prefill_and_cached_decode(name: str, tmp_path: Path) -> None:
    model = Model(write_tiny_gguf(tmp_path / "m.gguf", MODELS[name]))
    oracle = tiny_oracle(MODELS[name])
    tokens = torch.randint(
        0, MODELS[name].vocab_size, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(4)
    ).tolist()
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens])).logits[0]
    got = [model.append(tokens[:PROMPT])] + [model.append([token]) for token in tokens[PROMPT:]]
    assert expected.std() > 0.5, "the oracle's logits must say something"
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4)


def test_prefill_in_chunks_equals_prefill_at_once(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", TinyModel(type=Type.Q4_0))
    tokens = list(range(20, 50))
    whole = Model(path).append(tokens)
    chunked = Model(path)
    parts = torch.cat([chunked.append(tokens[:11]), chunked.append(tokens[11:12]), chunked.append(tokens[12:])])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"llama__vocab_size": 17}, "token_embd.weight.*shape"),
        ({"llama__feed_forward_length": 128}, "ffn_gate.weight.*shape"),
        ({"llama__block_count": 9}, "lacks tensor 'blk.4"),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(tmp_path: Path, changed: dict[str, int], says: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", TinyModel(), **changed)
    with pytest.raises(ModelFileError, match=says):
        Model(path)


def test_a_tensor_that_the_decoder_does_not_know_is_refused(tmp_path: Path) -> None:
    # "attn_q.bias" would be an honest example; a longer header name makes one out of the norm's weight.
    path = write_tiny_gguf(tmp_path / "m.gguf", TinyModel(n_layers=1))
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_norm.weight", b"blk.0.ffn_norm.biases"))
    with pytest.raises(ModelFileError, match=r"ffn_norm"):
        Model(path)
