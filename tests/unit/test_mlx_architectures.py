"""Every architecture by MLX gives the logits of `transformers`, unsplit, at every cut, and in pipelines with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.architectures import FOLDERS, Oracle, check_batch, check_model, load_torch, prompt_of
from support.mlx_device import MLX_DEVICE

from swarmd.node.engine.decoder_compute import DecoderCompute
from swarmd.node.engine.stage_compute import StageCompute
from swarmd.node.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow
pytest.importorskip("mlx.core", reason="MLX is not installed (pip install 'swarmd[mlx]')")


def load_mlx(path: Path, start: int, end: int, context: int) -> StageCompute:
    """In fp32."""
    from swarmd.node.engine.backends.mlx import MlxBackend

    with open_checkpoint(path) as checkpoint:
        backend = MlxBackend(MLX_DEVICE)
        return DecoderCompute.load(checkpoint, start, end, backend, kv_tokens=3 * context, context=context)


def mlx_first(path: Path, start: int, end: int, context: int) -> StageCompute:
    return (load_mlx if start == 0 else load_torch)(path, start, end, context)


def mlx_after_torch(path: Path, start: int, end: int, context: int) -> StageCompute:
    return (load_torch if start == 0 else load_mlx)(path, start, end, context)


@pytest.mark.parametrize("name", FOLDERS)
def test_alone_split_mixed_and_in_company(name: str, tmp_path: Path) -> None:
    model, folder = FOLDERS[name](), tmp_path / "model"
    model.save_pretrained(folder)
    oracle, layers = Oracle.of(model, prompt_of(name)), model.config.num_hidden_layers
    check_model(oracle, folder, [0, layers], load_mlx)
    for cut in range(1, layers):
        for load in (load_mlx, mlx_first, mlx_after_torch):
            check_model(oracle, folder, [0, cut, layers], load)
    check_batch(oracle, Oracle.of(model, oracle.prompt - 7, seed=5), folder, range(layers + 1), load_mlx)
