"""Every quantized type of GGUF, computed with: logits against `transformers` with the same values in fp32."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf
from support.decoding import decoder_logits
from support.gguf_blocks import weight_blocks
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import SIZES

from swarmd.node.engine.gguf_blocks import QUANTIZED_FORMS
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint
from swarmd.node.models.gguf_types import GGUFType

WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": True}


@pytest.mark.parametrize("kind", QUANTIZED_FORMS)
def test_logits_of_a_model_of_one_type(kind: GGUFType, tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **WIDTHS, "attn_implementation": "eager"})).float().eval()
    path = write_gguf_of(
        model,
        tmp_path / "m.gguf",
        raw_of=lambda values: (
            gguf.GGMLQuantizationType(int(kind)),
            weight_blocks(kind, *values.shape, deviation=1.2 * values.shape[1] ** -0.5, seed=len(values)),
        ),
    )
    tokens = list(range(5, 45))
    with torch.no_grad(), open_checkpoint(path) as checkpoint:
        model.load_state_dict(state_of(checkpoint))
        expected = model(torch.tensor([tokens])).logits[0]
        got = decoder_logits(checkpoint, tokens)
    assert expected.std() > 0.3, "the oracle's logits must say something"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-4)


def state_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What the file holds, under `transformers`' names for Llama; `test_quantized` compares the values themselves."""
    names = tensor_shapes(checkpoint.spec, 0, checkpoint.spec.n_layers)
    state = {name: torch.from_numpy(checkpoint.read(name).dequantize()) for name in names}
    state = {name.replace("pre_feedforward", "post_attention"): values for name, values in state.items()}
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
