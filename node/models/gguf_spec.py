"""A model's architecture, from the header of a GGUF file
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from swarmd.node.engine.spec import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    ArchSpec,
    LayerSpec,
    MoeSpec,
    RopeSpec,
)
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_families import FAMILIES, WHY_NOT, Family
from swarmd.node.models.gguf_keys import ArchKeys, refuse, shown
from swarmd.node.models.gguf_names import HEAD, layer_prefix
from swarmd.node.models.gguf_rope import ReadVector, no_vectors, ropes_of

MAX_EXPERTS_IN_ALL = 1 << 16
"""Experts of all layers together: every one has tensors with names. The largest models have some 25,000."""


def spec_from_gguf(
    metadata: Mapping[str, object], tensor_names: Collection[str], read_vector: ReadVector = no_vectors
) -> ArchSpec:
    """The architecture that a GGUF header describes; `read_vector` reads what of it is in tensors (LongRoPE's factors).

    Raises ModelFileError for an unknown architecture (naming it and the known ones), for missing or
    impossible values, and for keys that the decoder does not implement.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        known = WHY_NOT.get(str(name))
        why = f": {known}" if known else ", which is not supported"
        raise ModelFileError(
            f"the model's architecture is {name!r:.60}{why}; supported architectures: {', '.join(FAMILIES)}"
        )
    keys = ArchKeys(metadata, name)
    spec = _Reader(name, FAMILIES[name], keys, tensor_names, read_vector, metadata).spec()
    keys.refuse_unread()
    return spec


class _Reader:
    def __init__(
        self,
        name: str,
        family: Family,
        keys: ArchKeys,
        names: Collection[str],
        read_vector: ReadVector,
        metadata: Mapping[str, object],
    ) -> None:
        self._name = name
        self._family = family
        self._keys = keys
        self._names = names
        self._read_vector = read_vector
        self._metadata = metadata
        self._n_layers = keys.integer("block_count", MAX_LAYERS)
        self._hidden = keys.integer("embedding_length", MAX_WIDTH)
        self._n_heads = keys.integer("attention.head_count", MAX_WIDTH)
        self._head_dim = self._checked_head_dim()

    def spec(self) -> ArchSpec:
        keys, family = self._keys, self._family
        context = keys.integer("context_length", MAX_CONTEXT)
        n_kv_heads = keys.integer("attention.head_count_kv", MAX_WIDTH, default=self._n_heads)
        if self._n_heads % n_kv_heads:
            refuse(f"{self._n_heads} attention heads cannot share {n_kv_heads} key-value heads")
        if not keys.flag("attention.causal", default=True):
            refuse("its attention is not causal: it is no model that generates text")
        ropes = ropes_of(keys, family, self._head_dim, context, self._names, self._read_vector)
        moe = self._moe()
        logit_divisor = keys.optional_number("logit_scale") if self._is_granite else None
        return ArchSpec(
            architecture=self._name,
            hidden_size=self._hidden,
            n_heads=self._n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=self._head_dim,
            ffn_size=keys.integer("feed_forward_length", MAX_WIDTH, default=moe.ffn_size if moe else None),
            vocab_size=keys.integer("vocab_size", MAX_VOCAB, default=_vocabulary_size(self._metadata)),
            context_length=context,
            rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
            layers=self._layers(ropes, moe),
            ropes=ropes,
            tied_embeddings=HEAD not in self._names,
            norms=family.norms,
            qk_norm=family.qk_norm,
            activation=family.activation,
            qkv_bias="qkv" in family.biases or self._in_first_layer("attn_q.bias", "attn_qkv.bias"),
            output_bias="output" in family.biases or self._in_first_layer("attn_output.bias"),
            mlp_bias=self._in_first_layer("ffn_up.bias"),
            sinks=family.sinks,
            attention_scale=self._attention_scale(),
            attention_softcap=keys.optional_number("attn_logit_softcapping"),
            logit_softcap=keys.optional_number("final_logit_softcapping"),
            embedding_multiplier=self._embedding_multiplier(),
            residual_multiplier=(keys.optional_number("residual_scale") or 1.0) if self._is_granite else 1.0,
            logit_multiplier=1.0 if logit_divisor is None else 1.0 / logit_divisor,
            moe=moe,
        )

    @property
    def _is_granite(self) -> bool:
        return self._name.startswith("granite")

    def _checked_head_dim(self) -> int:
        even = max(1, self._hidden // self._n_heads)
        head_dim = self._keys.integer("attention.key_length", MAX_WIDTH, default=even)
        if self._keys.integer("attention.value_length", MAX_WIDTH, default=even) != head_dim:
            refuse("its key and value heads differ in size, which is not supported")
        for key in ("attention.key_length_swa", "attention.value_length_swa"):
            if self._keys.integer(key, MAX_WIDTH, default=head_dim) != head_dim:
                refuse("its layers with a window have heads of another size, which is not supported")
        return head_dim

    def _attention_scale(self) -> float:
        """0.0 stands for the usual 1 / sqrt(head size).

        Gemma's models of 27B divide by the square root of hidden size / heads, which only their number of layers tells.
        """
        scale = self._keys.optional_number("attention.scale")
        if scale is None and self._n_layers == self._family.layers_of_27b:
            return (self._hidden / self._n_heads) ** -0.5
        return scale or 0.0

    def _embedding_multiplier(self) -> float:
        if self._is_granite:
            return self._keys.optional_number("embedding_scale") or 1.0
        return self._hidden**0.5 if self._family.scaled_embedding else 1.0

    def _in_first_layer(self, *parts: str) -> bool:
        """Whether the first layer has such a tensor; `check` of the checkpoint sees that all layers are alike."""
        return any(layer_prefix(0) + part in self._names for part in parts)

    def _layers(self, ropes: tuple[RopeSpec, ...], moe: MoeSpec | None) -> tuple[LayerSpec, ...]:
        period = self._family.no_rope_period
        positions = not self._is_granite or self._keys.flag("rope.scaling.finetuned", default=True)
        layers: list[LayerSpec] = []
        for layer, window in enumerate(self._windows()):
            rope = (len(ropes) - 1 if window else 0) if positions and (not period or (layer + 1) % period) else None
            has_experts = moe is not None and f"{layer_prefix(layer)}ffn_gate_inp.weight" in self._names
            layers.append(LayerSpec(window, rope, has_experts))
        return tuple(layers)

    def _windows(self) -> list[int | None]:
        """The window of each layer."""
        if not self._family.window_period:
            return [None] * self._n_layers
        default, period = self._family.default_window, self._family.window_period
        window = self._keys.integer("attention.sliding_window", MAX_CONTEXT, default=default, minimum=0)
        pattern = self._keys.listed("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            if len(pattern) != self._n_layers or not all(isinstance(item, bool | int) for item in pattern):
                refuse(f"attention.sliding_window_pattern {shown(pattern)} is not one truth value for each layer")
            seen = [bool(item) for item in pattern]
        else:
            period = self._keys.integer("attention.sliding_window_pattern", MAX_LAYERS, default=period)
            seen = [period == 1 or layer % period < period - 1 for layer in range(self._n_layers)]
        return [window if windowed and window else None for windowed in seen]

    def _moe(self) -> MoeSpec | None:
        keys = self._keys
        n_experts = keys.integer("expert_count", MAX_EXPERTS, default=0, minimum=0)
        top_k = keys.integer("expert_used_count", MAX_EXPERTS, default=0, minimum=0)
        for key in ("expert_group_count", "expert_group_used_count"):
            if keys.integer(key, MAX_EXPERTS, default=0, minimum=0) > 1:
                refuse(f"{key} of more than one is not supported for this architecture")
        gating = keys.integer("expert_gating_func", 255, default=1, minimum=0)
        normalize = keys.flag("expert_weights_norm", default=self._family.normalize)
        scale = keys.optional_number("expert_weights_scale") or 1.0
        if not n_experts:
            return None
        if not 1 <= top_k <= n_experts or n_experts * self._n_layers > MAX_EXPERTS_IN_ALL:
            refuse(f"{top_k} of {n_experts} experts in {self._n_layers} layers are not possible")
        if gating > 3:
            refuse(f"expert_gating_func {gating} is not supported")
        shared_ffn_size, gated = self._shared_ffn_size(), self._somewhere("ffn_gate_inp_shexp.weight")
        return MoeSpec(
            n_experts=n_experts,
            top_k=top_k,
            ffn_size=self._expert_ffn_size(top_k),
            score="sigmoid" if gating == 2 else "softmax",
            normalize=normalize or gating == 3,  # 3: softmax over the chosen ones only, which is the same
            scale=scale,
            router_bias="experts" in self._family.biases or self._somewhere("ffn_gate_inp.bias"),
            expert_bias="experts" in self._family.biases or self._somewhere("ffn_up_exps.bias"),
            shared_ffn_size=shared_ffn_size,
            shared_gate=shared_ffn_size > 0 and (gated or self._family.shared_gate),
            selection_bias=self._somewhere("exp_probs_b.bias"),
        )

    def _somewhere(self, part: str) -> bool:
        """Whether a layer has such a tensor: models may begin with layers without experts."""
        return any(layer_prefix(layer) + part in self._names for layer in range(self._n_layers))

    def _expert_ffn_size(self, top_k: int) -> int:
        """Where the file doesn't say: the dense size, which Qwen 2 divides among the experts that run."""
        dense = self._keys.integer("feed_forward_length", MAX_WIDTH, default=0, minimum=0)
        default = dense // top_k if self._name == "qwen2moe" else dense
        return self._keys.integer("expert_feed_forward_length", MAX_WIDTH, default=default)

    def _shared_ffn_size(self) -> int:
        size = self._keys.integer("expert_shared_feed_forward_length", MAX_WIDTH, default=0, minimum=0)
        if not self._somewhere("ffn_up_shexp.weight"):
            return size
        return size or self._keys.integer("feed_forward_length", MAX_WIDTH)


def _vocabulary_size(metadata: Mapping[str, object]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None
