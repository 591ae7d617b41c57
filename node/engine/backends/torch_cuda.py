"""The CUDA backend: torch's operations on a GPU, matrices that stay quantized there, a paged KV cache.

Activations between products are fp32, products multiply in bf16 and sum in fp32 (in fp32 throughout when asked for, as
the tests do, and where a file keeps a matrix in f32, as routers), keys and values are kept in bf16. A step whose
sequences all append one token touches nothing of the host (no sizes, no values), so that it can be captured in a CUDA
graph.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from swarmd.node.engine.backends import torch_experts, torch_paged
from swarmd.node.engine.backends.base import AttentionShape, LayerCache, RowSpan
from swarmd.node.engine.backends.torch_experts import StackedExperts
from swarmd.node.engine.backends.torch_ops import TorchOps, attend_to_latents, rotate, route
from swarmd.node.engine.backends.torch_packed import DensePart, PackedMatrix, PackedPart, Part, packed, product
from swarmd.node.engine.backends.torch_paged import LongSpan, PagedBatch, PagedPool
from swarmd.node.engine.quantized import QuantizedWeight, Scales, Weight
from swarmd.node.engine.spec import Activation, MoeSpec
from swarmd.node.engine.stage_compute import WireDtype
from swarmd.node.engine.weights import AttentionWeights, LatentWeights, MlpWeights, MoeWeights

log = logging.getLogger("swarmd.engine")

FEW_ROWS = 16
"""Up to so many rows a product reads the packed codes; for more, tiles are dequantized and multiplied by cuBLAS."""
OLDEST = (8, 0)
"""Compute capability from which on Triton's kernels are used: Ampere."""
SCORES = 1 << 24
"""At most so many scores of attention are held at a time, 64 MiB, when prompts are read."""


class TorchCudaBackend(TorchOps):
    """See `Backend`. `batch` and `pools` are set by the compute before each step; `caches` are then layer numbers."""

    def __init__(self, device: torch.device, product_type: torch.dtype = torch.bfloat16, *, fused: bool = True) -> None:
        """`fused`: use Triton's kernels, if they work on this device."""
        self.name = f"torch-{device}"
        self.device = device
        self.product_type = product_type
        self.pools: list[PagedPool] = []
        self.batch: PagedBatch | None = None
        self.fused = fused and kernels_work(device)
        self._attend_lone = torch_paged.attend
        self._chosen_product = torch_experts.chosen_product
        self._read: Callable[[Part, int, int], torch.Tensor] | None = None
        if self.fused:
            from swarmd.node.engine.backends import triton_attention, triton_product

            self._attend_lone = triton_attention.attend
            self._chosen_product = triton_product.chosen_product
            self._read = self._dequantized

    def prepare(self, parts: Sequence[Weight]) -> PackedMatrix:
        """On the device, as they are."""
        return packed(parts, self.device)

    def prepare_vector(self, values: np.ndarray) -> torch.Tensor:
        """A copy on the device."""
        return torch.from_numpy(values.astype(np.float32)).to(self.device)

    def prepare_experts(self, experts: Sequence[MlpWeights]) -> StackedExperts | tuple[MlpWeights, ...]:
        """Stacked, or one by one where they differ in form: such a layer's steps cannot be captured."""
        return torch_experts.stacked(experts) or tuple(experts)

    def receive(self, data: Any, dtype: WireDtype, rows: int, columns: int) -> torch.Tensor:
        """fp32 on the device; bf16 crosses the bus as such."""
        kind = torch.float32 if dtype == "f32" else torch.bfloat16
        return torch.frombuffer(bytearray(data), dtype=kind).view(rows, columns).to(self.device).float()

    def send(self, x: torch.Tensor, dtype: WireDtype) -> memoryview:
        """bf16 is rounded to nearest even, on the device."""
        values = (x.contiguous() if dtype == "f32" else x.bfloat16()).cpu()
        return memoryview(cast(Any, values.view(torch.uint8).reshape(-1).numpy()))

    def embed(self, table: PackedMatrix, tokens: Any) -> torch.Tensor:
        """`tokens` may be a tensor on the device."""
        return table.rows_at(torch.as_tensor(tokens, dtype=torch.int64, device=self.device))

    def linear(self, x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """fp32, whatever the products are in."""
        outputs = [self._product(x.to(self._type_of(part)), part) for part in weight.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return y if bias is None else y + bias

    def _product(self, x: torch.Tensor, part: Part) -> torch.Tensor:
        if self.fused and isinstance(part, PackedPart) and len(x) <= FEW_ROWS:
            from swarmd.node.engine.backends import triton_product

            return triton_product.product(x, part)
        return product(x, part, self._read).float()

    def _type_of(self, part: Part) -> torch.dtype:
        """In what a part is multiplied."""
        exact = isinstance(part, DensePart) and part.weights.dtype is torch.float32
        return torch.float32 if exact else self.product_type

    def _product_of_chosen(self, x: torch.Tensor, part: Part, chosen: torch.Tensor, experts: int) -> torch.Tensor:
        return self._chosen_product(x.to(self._type_of(part)), part, chosen, experts)

    def _dequantized(self, part: Part, begin: int, end: int) -> torch.Tensor:
        from swarmd.node.engine.backends import triton_product

        if isinstance(part, PackedPart):
            return triton_product.values(part, begin, end, self.product_type)
        return part.values(slice(begin, end)).to(self._type_of(part))

    def rotation(
        self, positions: Sequence[int], frequencies: torch.Tensor, magnitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions are those of the batch."""
        assert self.batch is not None
        angles = self.batch.positions.float()[:, None, None] * frequencies
        return angles.cos().mul_(magnitude), angles.sin().mul_(magnitude)

    def attention(
        self,
        qkv: torch.Tensor,
        shape: AttentionShape,
        weights: AttentionWeights,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """`caches[0]` is the layer's number."""
        batch, pool = self.batch, self.pools[cast(int, caches[0])]
        assert batch is not None
        heads, kv_heads = shape.heads, shape.kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, shape.head_dim)
        self.norm_and_rotate(qkv, shape, weights, rotation)
        pool.write(batch.slots, qkv[:, heads:-kv_heads], qkv[:, -kv_heads:])
        queries = qkv[:, :heads]

        def attend(span: LongSpan, begin: int, end: int) -> torch.Tensor:
            start = span.start + begin - span.begin
            first = 0 if shape.window is None else max(0, start - shape.window + 1)
            keys, values = pool.read(span.table, first, start + end - begin)
            found = self.attend(queries[begin:end], keys, values, start - first, shape, weights)
            return found.view(end - begin, heads, -1)

        return self._attend(queries, None, pool, shape, weights.sinks, attend)

    def latent_attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        latents: torch.Tensor,
        shape: AttentionShape,
        weights: LatentWeights,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """`caches[0]` is the layer's number."""
        batch, pool, latent = self.batch, self.pools[cast(int, caches[0])], shape.latent
        assert batch is not None
        assert latent is not None
        queries = queries.view(len(queries), shape.heads, shape.head_dim)
        if rotation is not None:
            rotate(queries[..., latent.nope_dim :], *rotation)
            rotate(keys[:, None], *rotation)
        pool.write(batch.slots, keys[:, None], latents[:, None])

        def attend(span: LongSpan, begin: int, end: int) -> torch.Tensor:
            near, seen = pool.read(span.table, 0, span.start + end - span.begin)
            found = attend_to_latents(queries[begin:end].transpose(0, 1), near[0], seen[0], shape, weights)
            return found.transpose(0, 1)

        if batch.lone is None:
            return self._attend(queries, None, pool, shape, None, attend)
        into_latents, into_values = weights.kv_b.split((latent.nope_dim, latent.value_dim), dim=1)
        absorbed = torch.einsum("rhd,hdk->rhk", queries[..., : latent.nope_dim], into_latents)
        return self._attend(
            queries[..., latent.nope_dim :], absorbed, pool, shape, None, attend,
            lambda mixed: torch.einsum("rhk,hvk->rhv", mixed, into_values),
        )  # fmt: skip

    def _attend(
        self,
        queries: torch.Tensor,
        latent_queries: torch.Tensor | None,
        pool: PagedPool,
        shape: AttentionShape,
        sinks: torch.Tensor | None,
        attend_long: Callable[[LongSpan, int, int], torch.Tensor],
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda mixed: mixed,
    ) -> torch.Tensor:
        """[rows, heads * dim]: rows that are alone all at once, `finish` being applied, others piece by piece."""
        batch = self.batch
        assert batch is not None
        parts: list[tuple[torch.Tensor | slice, torch.Tensor]] = []
        if batch.lone is not None:
            lone = batch.lone
            found = self._attend_lone(
                queries if lone.rows is None else queries[lone.rows],
                latent_queries if lone.rows is None or latent_queries is None else latent_queries[lone.rows],
                *(pool.keys, pool.values, lone.tables, lone.positions),
                scale=shape.scale,
                softcap=shape.softcap,
                window=shape.window,
                sinks=sinks,
            )
            found = finish(found)
            if lone.rows is None:
                return found.reshape(len(found), -1)
            parts.append((lone.rows, found))
        for span in batch.long:
            parts += [(slice(*rows), attend_long(span, *rows)) for rows in _pieces(span, shape.heads)]
        out = torch.empty(len(queries), *parts[0][1].shape[1:], device=self.device)
        for rows, found in parts:
            out[rows] = found
        return out.view(len(out), -1)

    def mixture(
        self, x: torch.Tensor, scores: torch.Tensor, moe: MoeSpec, weights: MoeWeights, activation: Activation
    ) -> torch.Tensor:
        """Alone rows all at once, without asking the host which experts they chose; many rows expert by expert."""
        batch, experts = self.batch, weights.experts
        assert batch is not None
        if batch.long or not isinstance(experts, StackedExperts):
            return super().mixture(x, scores, moe, weights, activation)
        shares, chosen = route(scores, moe, weights.selection_bias)
        options = (chosen.view(-1), experts.count, self._product_of_chosen)
        gated = self.gate(experts.gate_up.product(x, *options), activation)
        found = experts.down.product(gated, *options)
        return (found.view(*chosen.shape, -1) * shares[..., None]).sum(1)

    def select(self, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy."""
        return x[torch.tensor(rows, dtype=torch.int64, device=self.device)]

    def logits(self, x: torch.Tensor) -> Any:
        """They stay on the device: the compute takes those that are wanted."""
        return x


def _pieces(span: LongSpan, heads: int) -> Iterator[tuple[int, int]]:
    """The span's rows in pieces of which SCORES are held at a time."""
    step = max(1, SCORES // (heads * (span.start + span.end - span.begin)))
    for begin in range(span.begin, span.end, step):
        yield begin, min(begin + step, span.end)


def kernels_work(device: torch.device) -> bool:
    """Whether Triton is here and compiles for the device, which takes a C compiler too; if not, the log says why.

    Older GPUs than Ampere have no bf16 in hardware, and less shared memory than latent attention takes.
    """
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: weights are dequantized for every product, which is slower")
        return False
    if device.type == "cpu":
        return True  # only in Triton's interpreter, as whoever asks for it on a CPU must know
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        log.warning("%s has compute capability %d.%d: weights are dequantized for every product", device, *capability)
        return False
    try:
        from swarmd.node.engine.backends import triton_product

        few = QuantizedWeight(8, 32, np.zeros((32, 16), np.uint32), Scales(np.zeros((32, 2), np.float16)), None)
        triton_product.product(torch.zeros(1, 64, dtype=torch.bfloat16, device=device), packed([few], device).parts[0])
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton, its compilers and the driver each have errors of their own
        log.warning("Triton's kernels do not work on %s, so weights are dequantized, slower: %s", device, error)
        return False
    return True
