"""Look for accelerators: `python -m swarmd.node.engine.devices KIND...` prints JSON; with `--measure ID...` how fast
they are.

Run as a process of its own, so that the daemon imports neither torch nor MLX, and what a driver does wrong stays there.
Neither library need be there: what is missing is told, with what to do about it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from typing import Any, TypedDict

import psutil

from swarmd.node.engine.computes import require_backend
from swarmd.node.engine.rates import best_rate

# Larger than any accelerator's caches; less where memory is short.
READ_BYTES = 1 << 30
PRODUCT_SIZE = 4096
MLX_CPU_SHARE = 4  # the processor needs no such amounts


class Found(TypedDict):
    """A device, as `swarmd.node.devices.FoundDevice` holds it."""

    id: str
    name: str
    memory_total: int
    memory_free: int


class Rates(TypedDict):
    """Reading memory in bytes/s, fp32 products in FLOP/s."""

    memory_bandwidth: float
    compute: float


class Unusable(Exception):
    """Why there is no device of a kind, and what to do."""


def find_cuda() -> list[Found]:
    """The GPUs that PyTorch sees. Its memory figures are those of the driver, after the context that PyTorch takes.

    Raises Unusable.
    """
    import torch

    if torch.version.cuda is None:
        raise Unusable(
            f"PyTorch {torch.__version__} was built without CUDA; install one that has it (https://pytorch.org)"
        )
    if not torch.cuda.is_available():
        raise Unusable("PyTorch finds no NVIDIA GPU that it can use; `nvidia-smi` says whether the driver does")
    found: list[Found] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(Found(id=f"cuda:{index}", name=name, memory_total=total, memory_free=free))
    return found


def find_metal() -> list[Found]:
    """The GPU of a Mac, by MLX. Its memory is what the system lets a GPU take of the main memory. Raises Unusable."""
    mx = _mlx("metal")
    if not mx.metal.is_available():
        raise Unusable("MLX finds no Metal GPU; it needs a Mac with Apple silicon and macOS 13.5 or later")
    info = mx.device_info()
    total = int(info["max_recommended_working_set_size"])
    free = min(total, psutil.virtual_memory().available)
    return [Found(id="metal", name=str(info["device_name"]), memory_total=total, memory_free=free)]


def find_mlx() -> list[Found]:
    """The processor as MLX computes on it. Raises Unusable."""
    mx = _mlx("cpu")
    with mx.stream(mx.cpu):
        mx.eval(mx.ones(1) + 1)
    memory = psutil.virtual_memory()
    return [Found(id="mlx-cpu", name="CPU by MLX", memory_total=memory.total, memory_free=memory.available)]


def _mlx(extra: str) -> Any:
    """`mlx.core`. Raises Unusable."""
    if importlib.util.find_spec("mlx") is None:
        package = "mlx" if extra == "metal" else f"'mlx[{extra}]'"
        raise Unusable(f"MLX is not installed: pip install {package}")
    try:
        import mlx.core as mx
    except ImportError as error:
        raise Unusable(f"MLX cannot be loaded: {error}") from None
    return mx


FINDERS: dict[str, Callable[[], list[Found]]] = {"cuda": find_cuda, "metal": find_metal, "mlx": find_mlx}
FIRST_IDS = {"cuda": "cuda:0", "metal": "metal", "mlx": "mlx-cpu"}


def look(kinds: list[str]) -> dict[str, Any]:
    """`{"devices": [Found], "missing": {kind: why, and what to do}}`."""
    devices: list[Found] = []
    missing: dict[str, str] = {}
    for kind in kinds:
        try:
            require_backend(FIRST_IDS[kind])  # first, because importing a library takes seconds
            found = FINDERS[kind]()
        except (Unusable, ValueError) as error:
            missing[kind] = str(error)
        except Exception as error:  # a driver's or library's own trouble costs its devices, no more
            missing[kind] = f"{type(error).__name__}: {error}"[:300]
        else:
            devices += found
    return {"devices": devices, "missing": missing}


def measure(device: str) -> Rates:
    """How fast a device is that `look` has found."""
    return _measure_cuda(device) if device.startswith("cuda:") else _measure_mlx(device)


def _measure_cuda(device: str) -> Rates:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    count = min(READ_BYTES, free // 4) // 4
    data = torch.ones(count, dtype=torch.float32, device=device)
    a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device)

    def done(work: Callable[[], object]) -> Callable[[], object]:
        """Work on a GPU is only queued when its call returns."""
        return lambda: (work(), torch.cuda.synchronize(device))

    bandwidth = best_rate(done(data.sum), 4 * count)
    return Rates(memory_bandwidth=bandwidth, compute=best_rate(done(lambda: a @ a), 2.0 * PRODUCT_SIZE**3))


def _measure_mlx(device: str) -> Rates:
    import mlx.core as mx

    share = MLX_CPU_SHARE if device == "mlx-cpu" else 1
    count, size = READ_BYTES // 4 // share, PRODUCT_SIZE // share
    with mx.stream(mx.cpu if device == "mlx-cpu" else mx.gpu):
        data, a = mx.ones(count), mx.ones((size, size))
        mx.eval(data, a)
        bandwidth = best_rate(lambda: mx.eval(mx.sum(data)), 4 * count)
        return Rates(memory_bandwidth=bandwidth, compute=best_rate(lambda: mx.eval(a @ a), 2.0 * size**3))


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(FINDERS))
    parser.add_argument("--measure", nargs="+", default=[], metavar="ID")
    args = parser.parse_args()
    print(json.dumps({device: measure(device) for device in args.measure} if args.measure else look(args.kinds)))


if __name__ == "__main__":
    main()
