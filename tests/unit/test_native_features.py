"""What a native step does around attention beyond Llama's, on every code path of this machine, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.native_kernels import Product, U, exceeds, machine_isas
from support.native_reference import (
    HALF,
    gated,
    gated_by_clamped_swiglu,
    gated_by_gelu,
    normed,
    signs,
    sixty_fourths,
)
from support.native_stage import LayerParts, NativeStage, Part, Shape, dense, vector

from swarmd.node.engine.backends.torch_ops import route
from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.cpu.matrices import NativeMatrix
from swarmd.node.engine.spec import LayerSpec, MoeSpec
from swarmd.node.engine.weights import Linear, MlpWeights, MoeWeights

FOUND = machine_isas()
pytestmark = pytest.mark.skipif(not FOUND, reason="the native kernels are not built here (make native)")

REFERENCES = {"silu": gated, "gelu_tanh": gated_by_gelu, "clamped_swiglu": gated_by_clamped_swiglu}


@pytest.fixture(params=FOUND or ["none"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    assert library.select(request.param)
    yield request.param
    library.select(best)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


class TestActivation:
    @pytest.mark.parametrize("name", REFERENCES)
    @pytest.mark.parametrize("ffn", [1, 16, 37, 100])
    @pytest.mark.parametrize("biased", [False, True])
    def test_of_gate_and_up_with_their_biases(self, rng: np.random.Generator, name: str, ffn: int, biased: bool):
        """Through an identity, added to inputs of 1: the sum rounds once more. Gates reach from -20 to 20."""
        shape = Shape(ffn, ffn=ffn)
        weights = np.concatenate([sixty_fourths(rng, ffn, ffn, 20 / ffn**0.5), sixty_fourths(rng, ffn, ffn)])
        biases = sixty_fourths(rng, 1, 2 * ffn, 4.0)[0] if biased else np.zeros(2 * ffn)
        vectors = {"gate_up_bias": biases} if biased else {}
        parts = LayerParts(shape, gate_up=dense(weights), down=dense(np.eye(ffn)), vectors=vectors)
        stage = NativeStage(shape, parts, tables={0: [0]}, threads=2, spec={"activation": name})
        x = signs(rng, 9, ffn)
        gate, up = np.split(x.astype(np.float64) @ weights.astype(np.float64).T + biases, 2, axis=1)
        expected = REFERENCES[name](gate, up)
        total = Product(x + expected.value, expected.bound + U * (np.abs(expected.value) + 1))
        assert exceeds(stage.step([Part(0, 0, x)]), total) <= 1

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("gelu_tanh", [4097.0, 1.0]), ("clamped_swiglu", [7.0 * 2 + 1, 1.0])],
    )
    def test_far_from_zero(self, name: str, expected: list[float]):
        """A gate of thousands passes or shuts, without overflow."""
        shape = Shape(2, ffn=2)
        parts = LayerParts(
            shape, gate_up=dense(np.array([[4096.0, 0], [-4096.0, 0], [1, 0], [1, 0]])), down=dense(np.eye(2))
        )
        stage = NativeStage(shape, parts, tables={0: [0]}, spec={"activation": name})
        found = stage.step([Part(0, 0, np.ones((1, 2), np.float32))])
        assert found[0] == pytest.approx(expected, rel=1e-4)


class TestAdding:
    """One token attends to itself alone, so that attention's output is its value, exactly."""

    @pytest.mark.parametrize("hidden", [6, 16, 50])
    @pytest.mark.parametrize("factor", [1.0, 0.22])
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("post_norm", [False, True])
    def test_bias_norm_and_multiplier(
        self, rng: np.random.Generator, hidden: int, factor: float, biased: bool, post_norm: bool
    ):
        shape = Shape(hidden, 1, 1, hidden)
        weights = sixty_fourths(rng, 3 * hidden, hidden, 4 / hidden)
        bias = sixty_fourths(rng, 1, hidden)[0] if biased else np.zeros(hidden)
        vectors = {"attention_output_bias": bias} if biased else {}
        norm = vector(rng.normal(1, 0.5, hidden))
        if post_norm:
            vectors["attention_post_norm"] = norm
        parts = LayerParts(shape, qkv=dense(weights), attention_output=dense(np.eye(hidden)), vectors=vectors)
        stage = NativeStage(shape, parts, None, {0: [0]}, threads=2, eps=1e-5, spec={"residual_multiplier": factor})
        x = signs(rng, 1, hidden)
        scaled = x / np.sqrt(1 + np.float64(np.float32(1e-5)))
        value = (scaled.astype(np.float64) @ weights[2 * hidden :].astype(np.float64).T).astype(np.float16)
        # The token's value as the cache rounds it; then it is exact until the norm.
        stored = stage_value(stage, x)
        assert np.abs(stored - value).max() <= 2 * HALF * np.abs(value).max()
        exact = stored.astype(np.float64) + bias
        added = (
            normed(exact, U * np.abs(exact), norm.astype(np.float64), 1e-5) if post_norm else Product(exact, 0 * exact)
        )
        total = x + np.float64(np.float32(factor)) * added.value
        bound = added.bound + 4 * U * (np.abs(exact) + np.abs(added.value) + np.abs(total))
        assert exceeds(stage.step([Part(0, 0, x)]), Product(total, bound)) <= 1

    def test_without_norms_before(self, rng: np.random.Generator):
        """OLMo 2's blocks take the hidden states as they are."""
        shape = Shape(32, ffn=64)
        weights = sixty_fourths(rng, 128, 32)
        norm = vector(rng.normal(1, 0.5, 32))
        parts = LayerParts(
            shape,
            gate_up=dense(weights),
            down=dense(np.eye(32, 64)),
            vectors={"mlp_post_norm": norm},
            pre_norms=False,
        )
        stage = NativeStage(shape, parts, tables={0: [0]}, threads=2)
        x = sixty_fourths(rng, 5, 32, 4.0)
        gate, up = np.split(x.astype(np.float64) @ weights.astype(np.float64).T, 2, axis=1)
        one = gated(gate[:, :32], up[:, :32])
        added = normed(one.value, one.bound, norm.astype(np.float64), 0.0)
        total = x + added.value
        assert exceeds(stage.step([Part(0, 0, x)]), Product(total, added.bound + 2 * U * np.abs(total))) <= 1


def stage_value(stage: NativeStage, x: np.ndarray) -> np.ndarray:
    """The value of a sequence's only token, out of the cache."""
    stage.step([Part(0, 0, x)])
    return stage.values[0, 0, :1, : stage.shape.head_dim].astype(np.float32)


class TestEnds:
    def test_embedding_multiplier(self, rng: np.random.Generator):
        table = rng.normal(0, 1, (9, 40)).astype(np.float32)
        found = NativeStage(Shape(40), embedding=dense(table), spec={"embedding_multiplier": 6.25}).embed([8, 3], "f32")
        assert (found == table[[8, 3]] * np.float32(6.25)).all()

    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("vocab", [3, 5000])
    def test_logits(self, rng: np.random.Generator, softcap: float | None, vocab: int):
        """Exact products, times a quarter; tanh is good to 8 u of the cap and twice its argument's error."""
        x, head = signs(rng, 3, 32), sixty_fourths(rng, vocab, 32, 4.0)
        stage = NativeStage(
            Shape(32), head=dense(head), threads=2, spec={"logit_multiplier": 0.25, "logit_softcap": softcap}
        )
        logits = x.astype(np.float64) @ head.astype(np.float64).T * 0.25
        bound = 0 * logits
        if softcap is not None:
            bound = 16 * U * softcap + 4 * U * np.abs(logits)
            logits = softcap * np.tanh(logits / softcap)
        assert exceeds(stage.logits([Part(0, 0, x)], range(3)), Product(logits, bound)) <= 1


ROUTES = {
    "softmax": MoeSpec(12, 3, 32, normalize=False),
    "softmax, normalized": MoeSpec(12, 3, 32),
    "sigmoid": MoeSpec(12, 4, 32, score="sigmoid", normalize=False, scale=2.5),
    "all experts": MoeSpec(12, 12, 32),
    "one expert": MoeSpec(12, 1, 32, normalize=False),
    "router bias": MoeSpec(12, 3, 32, router_bias=True),
    "selection bias": MoeSpec(12, 3, 32, score="sigmoid", selection_bias=True),
    "groups": MoeSpec(12, 3, 32, score="sigmoid", n_groups=4, top_groups=2, scale=1.5),
    "groups and a selection bias": MoeSpec(
        12, 5, 32, score="sigmoid", n_groups=3, top_groups=2, selection_bias=True, normalize=False
    ),
    "all of the best group": MoeSpec(12, 4, 32, score="sigmoid", n_groups=3, selection_bias=True),
}


def mixture_stage(rng: np.random.Generator, moe: MoeSpec, router: np.ndarray, threads: int = 2) -> NativeStage:
    """Experts that give nothing but their biases: expert e adds 1 to hidden value e."""
    hidden = router.shape[1]

    def expert(number: int) -> MlpWeights:
        bias = vector(np.eye(hidden)[number])
        gate_up = Linear(NativeMatrix([dense(np.zeros((2 * moe.ffn_size, hidden)))]))
        return MlpWeights(gate_up, Linear(NativeMatrix([dense(np.zeros((hidden, moe.ffn_size)))]), bias))

    weights = MoeWeights(
        Linear(NativeMatrix([dense(router)]), vector(rng.normal(0, 1, moe.n_experts)) if moe.router_bias else None),
        vector(rng.normal(-0.5, 0.5, moe.n_experts)) if moe.selection_bias else None,
        tuple(map(expert, range(moe.n_experts))),
        None,
        None,
    )
    shape = Shape(hidden)
    parts = LayerParts(shape, moe=weights)
    return NativeStage(
        shape,
        parts,
        tables={0: range(4), 1: [4]},
        n_blocks=5,
        threads=threads,
        layer=LayerSpec(moe=True),
        spec={"moe": moe},
    )


class TestRouting:
    @pytest.mark.parametrize("rows", [1, 2, 50])
    @pytest.mark.parametrize("moe", ROUTES.values(), ids=list(ROUTES))
    def test_the_experts_weights_are_those_of_the_plain_router(self, rng: np.random.Generator, moe: MoeSpec, rows: int):
        """Logits are exact, exponentials and sigmoids good to 4 u, a sum of n to n u, then a few roundings."""
        x, router = signs(rng, rows, 20), rng.integers(-2048, 2048, (moe.n_experts, 20)) / 1024
        stage = mixture_stage(rng, moe, router)
        assert stage.parts is not None
        weights = stage.parts.moe
        assert weights is not None
        logits = x.astype(np.float64) @ router.astype(np.float64).T
        if weights.router.bias is not None:
            logits = (logits + weights.router.bias).astype(np.float32).astype(np.float64)
        bias = None if weights.selection_bias is None else torch.from_numpy(weights.selection_bias.astype(np.float64))
        shares, chosen = route(torch.from_numpy(logits), moe, bias)
        expected = np.zeros((rows, 20))
        np.put_along_axis(expected, chosen.numpy(), shares.numpy(), 1)
        bound = (2 * moe.n_experts + 16) * U * expected + U * (np.abs(x + expected))
        assert exceeds(stage.step([Part(0, 0, x)]), Product(x + expected, bound)) <= 1

    def test_of_equal_experts_those_of_lower_numbers_run(self, rng: np.random.Generator):
        router = np.zeros((12, 20))
        router[7] = 1 / 16
        moe = replace(ROUTES["softmax, normalized"], top_k=3)
        found = mixture_stage(rng, moe, router).step([Part(0, 0, np.ones((1, 20), np.float32))]) - 1
        assert found[0].nonzero()[0].tolist() == [0, 1, 7]

    @pytest.mark.parametrize("rows", [1, 19])
    def test_a_row_of_no_numbers_spoils_itself_only(self, rng: np.random.Generator, rows: int):
        x, router = signs(rng, rows, 20), sixty_fourths(rng, 12, 20)
        stage = mixture_stage(rng, ROUTES["groups"], router)
        expected = stage.step([Part(0, 0, x)])
        found = stage.step([Part(1, 0, np.full((1, 20), np.nan, np.float32)), Part(0, 0, x)])
        assert np.isnan(found[0]).all()
        assert (found[1:] == expected).all()
