"""Every architecture against `transformers`: tiny models as folders of safetensors, and the comparison of logits, for
whatever computes a stage and whatever kind of file its weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from support.tiny_hf import CASES, EXPERTS, LOCAL_EXPERTS, PHI3_LONG, YARN, _case

from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.decoder_compute import DecoderCompute
from swarmd.node.engine.stage_compute import Span, StageCompute, StageOutput
from swarmd.node.models.checkpoint import open_checkpoint

LoadStage = Callable[[Path, int, int, int], StageCompute]
"""(path of the model, first layer, last + 1, longest sequence) -> what computes these layers."""

STEPS = 8
PROMPT = 40
"""Longer than every window."""
LONG_PROMPT = 140
"""Longer than every original context that a rotary embedding is scaled from."""
SCALED = (
    *("llama 3", "llama yarn", "qwen2 yarn", "phi3 long", "phi4-mini", "olmo3", "gpt-oss"),
    *("deepseek_v2 lite", "deepseek_v2 in groups", "deepseek_v3"),
)
FP32_TOLERANCE = 2e-4

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
"""DeepSeek's sizes, no two of them alike."""

FOLDERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    **CASES,
    "mistral window": _case(hf.MistralConfig, hf.MistralForCausalLM, head_dim=32, sliding_window=16),
    "mixtral window": _case(hf.MixtralConfig, hf.MixtralForCausalLM, **LOCAL_EXPERTS, sliding_window=16),
    "qwen2 window": _case(
        hf.Qwen2Config, hf.Qwen2ForCausalLM, use_sliding_window=True, sliding_window=16, max_window_layers=2
    ),
    "qwen3 biases": _case(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=32, attention_bias=True),
    "qwen3moe, some layers plain": _case(
        hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, **EXPERTS, head_dim=32, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "smollm3 window": _case(hf.SmolLM3Config, hf.SmolLM3ForCausalLM, use_sliding_window=True, sliding_window=16),
    "phi4-mini": _case(
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        rope_parameters={**PHI3_LONG, "attention_factor": 1.2},
        original_max_position_embeddings=128,
        sliding_window=200,
    ),
    "gemma": _case(hf.GemmaConfig, hf.GemmaForCausalLM, head_dim=32, hidden_act="gelu_pytorch_tanh"),
    "olmoe": _case(hf.OlmoeConfig, hf.OlmoeForCausalLM, num_experts=6, num_experts_per_tok=2),
    "deepseek_v2 lite": _case(
        hf.DeepseekV2Config,
        hf.DeepseekV2ForCausalLM,
        **LATENT,
        q_lora_rank=None,
        n_shared_experts=2,
        first_k_dense_replace=1,
        rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v2 in groups": _case(
        hf.DeepseekV2Config,
        hf.DeepseekV2ForCausalLM,
        **LATENT,
        q_lora_rank=24,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        rope_parameters={**YARN, "mscale": 1.3, "mscale_all_dim": 0.8},
    ),
    "deepseek_v3": _case(
        hf.DeepseekV3Config,
        hf.DeepseekV3ForCausalLM,
        **LATENT,
        q_lora_rank=24,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=2,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_v3 rotate-half": _case(
        hf.DeepseekV3Config,
        hf.DeepseekV3ForCausalLM,
        **LATENT,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        first_k_dense_replace=0,
        rope_interleave=False,
    ),
}
"""What comes as folders, by what is special about it."""


@dataclass(frozen=True)
class Oracle:
    """A model of `transformers` in fp32, and what it says to some tokens."""

    model: hf.PreTrainedModel
    tokens: list[int]
    logits: np.ndarray
    prompt: int

    @classmethod
    def of(cls, model: hf.PreTrainedModel, prompt: int, *, seed: int = 4) -> Oracle:
        """Random tokens, `prompt` to be given at once and STEPS one by one."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, model.config.vocab_size, (prompt + STEPS,), generator=generator).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].float().numpy()
        assert logits.std() > 0.3, "the oracle's logits must say something"
        return cls(model, tokens, logits, prompt)

    def check(self, logits: np.ndarray, begin: int, end: int, tolerance: float = FP32_TOLERANCE) -> None:
        """Logits of tokens [begin, end) are the model's, up to a share of their whole range."""
        expected = self.logits[begin:end]
        worst = np.abs(logits - expected).max() / (self.logits.max() - self.logits.min())
        assert worst < tolerance, f"logits are off by {worst:.2g} of their range"


def prompt_of(name: str) -> int:
    """How long a prompt a case needs."""
    return LONG_PROMPT if name in SCALED else PROMPT


def load_torch(path: Path, start: int, end: int, context: int) -> StageCompute:
    """Plain torch, the oracle of the other backends."""
    torch.set_grad_enabled(False)
    with open_checkpoint(path) as checkpoint:
        backend = TorchCpuBackend()
        return DecoderCompute.load(checkpoint, start, end, backend, kv_tokens=3 * context, context=context)


class Stages:
    """A model computed by consecutive stages, activations travelling in f32."""

    def __init__(self, path: Path, cuts: Sequence[int], load: LoadStage, context: int) -> None:
        """`cuts`: the first layers of all stages, and the number of layers."""
        self._open: set[int] = set()
        self._stages = [load(path, start, end, context) for start, end in pairwise(cuts)]

    def step(self, tokens: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """Append tokens to sequences, opening new ones: the logits [tokens, vocab] of each."""
        for seq in tokens.keys() - self._open:
            for stage in self._stages:
                stage.open(seq)
        self._open |= tokens.keys()
        spans = [Span(seq, self._stages[0].length(seq), new) for seq, new in tokens.items()]
        rows = sum(len(span.tokens) for span in spans)
        output = StageOutput(None)
        for stage in self._stages:
            output = stage.forward(spans, output.payload, "f32", range(rows))
        assert output.logits is not None
        parts = np.split(output.logits.copy(), np.cumsum([len(span.tokens) for span in spans])[:-1])
        return {span.seq: part for span, part in zip(spans, parts, strict=True)}


def check_model(
    oracle: Oracle, path: Path, cuts: Sequence[int], load: LoadStage, tolerance: float = FP32_TOLERANCE
) -> None:
    """Prefill, then decode step by step, each logit compared."""
    stages = Stages(path, cuts, load, len(oracle.tokens))
    oracle.check(stages.step({0: oracle.tokens[: oracle.prompt]})[0], 0, oracle.prompt, tolerance)
    for at in range(oracle.prompt, len(oracle.tokens)):
        oracle.check(stages.step({0: oracle.tokens[at : at + 1]})[0], at, at + 1, tolerance)


def check_batch(
    oracle: Oracle, other: Oracle, path: Path, cuts: Sequence[int], load: LoadStage, tolerance: float = FP32_TOLERANCE
) -> None:
    """Two sequences in the same steps, one beginning while the other is under way, its prompt in two pieces."""
    stages = Stages(path, cuts, load, len(oracle.tokens))
    half, prompt = oracle.prompt // 2, oracle.prompt
    oracle.check(stages.step({0: oracle.tokens[:half]})[0], 0, half, tolerance)
    got = stages.step({0: oracle.tokens[half:prompt], 1: other.tokens[: other.prompt]})
    oracle.check(got[0], half, prompt, tolerance)
    other.check(got[1], 0, other.prompt, tolerance)
    for step in range(STEPS):
        first, second = prompt + step, other.prompt + step
        got = stages.step({1: other.tokens[second : second + 1], 0: oracle.tokens[first : first + 1]})
        oracle.check(got[0], first, first + 1, tolerance)
        other.check(got[1], second, second + 1, tolerance)
