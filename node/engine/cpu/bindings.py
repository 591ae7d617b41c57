"""The native library and its C interface (native/swarmd_native.h), by ctypes. Calls release the GIL."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_size_t, c_uint8, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ABI = 5
TILE = 16
"""Rows of a matrix that are packed together."""
GROUP = 32
"""Columns whose codes are packed together."""

LIBRARY_VARIABLE = "SWARMD_NATIVE_LIBRARY"
"""Environment variable that names another build of the library, such as one with sanitizers."""


class NativeMissing(RuntimeError):
    """The native library is not there, or not for this version; the message says why."""


class NativeScales(Structure):
    """SwarmdScales."""

    _fields_ = (("kind", c_int32), ("per_super", c_int32), ("values", c_void_p), ("supers", c_void_p))


class Segment(Structure):
    """SwarmdSegment."""

    _fields_ = (
        ("kind", c_int32),
        ("bits", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group_size", c_int32),
        ("offset", c_int32),
        ("table", c_int32),
        ("levels", c_uint8 * 16),
        ("codes", c_void_p),
        ("scale", NativeScales),
        ("bias", NativeScales),
    )


class Matrix(Structure):
    """SwarmdMatrix."""

    _fields_ = (("rows", c_int32), ("columns", c_int32), ("count", c_int32), ("segments", POINTER(Segment)))


class NativeLinear(Structure):
    """SwarmdLinear."""

    _fields_ = (("matrix", Matrix), ("bias", c_void_p))


class NativeMlp(Structure):
    """SwarmdMlp."""

    _fields_ = (("gate_up", NativeLinear), ("down", NativeLinear))


class NativeMixture(Structure):
    """SwarmdMixture."""

    _fields_ = (
        ("router", NativeLinear),
        ("selection_bias", c_void_p),
        ("experts", POINTER(NativeMlp)),
        ("shared", POINTER(NativeMlp)),
        ("shared_gate", POINTER(Matrix)),
    )


class Layer(Structure):
    """SwarmdLayer."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("sinks", c_void_p),
        ("attention_post_norm", c_void_p),
        ("qkv", NativeLinear),
        ("attention_output", NativeLinear),
        ("mlp_norm", c_void_p),
        ("mlp_post_norm", c_void_p),
        ("mlp", NativeMlp),
        ("mixture", POINTER(NativeMixture)),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int32),
        ("rope", c_int32),
    )


class NativeRope(Structure):
    """SwarmdRope."""

    _fields_ = (("frequencies", c_void_p), ("pairs", c_int32), ("magnitude", c_float))


class Routing(Structure):
    """SwarmdRouting."""

    _fields_ = (
        ("experts", c_int32),
        ("top_k", c_int32),
        ("ffn", c_int32),
        ("sigmoid", c_int32),
        ("normalize", c_int32),
        ("groups", c_int32),
        ("top_groups", c_int32),
        ("scale", c_float),
    )


class Stage(Structure):
    """SwarmdStage."""

    _fields_ = (
        ("n_layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("ffn", c_int32),
        ("kv_blocks", c_int32),
        ("qk_norm", c_int32),
        ("activation", c_int32),
        ("n_ropes", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("attention_softcap", c_float),
        ("logit_softcap", c_float),
        ("embedding_multiplier", c_float),
        ("residual_multiplier", c_float),
        ("logit_multiplier", c_float),
        ("routing", Routing),
        ("ropes", POINTER(NativeRope)),
        ("layers", POINTER(Layer)),
        ("embedding", POINTER(Matrix)),
        ("output_norm", c_void_p),
        ("head", POINTER(Matrix)),
    )


class Batch(Structure):
    """SwarmdBatch."""

    _fields_ = (
        ("rows", c_int32),
        ("sequences", c_int32),
        ("first_row", c_void_p),
        ("start", c_void_p),
        ("first_block", c_void_p),
        ("blocks", c_void_p),
        ("tokens", c_void_p),
        ("hidden", c_void_p),
        ("wire", c_int32),
        ("out", c_void_p),
        ("wanted", c_int32),
        ("wanted_rows", c_void_p),
        ("logits", c_void_p),
    )


class Summary(Structure):
    """SwarmdSummary."""

    _fields_ = (("finite", c_int32), ("best", c_int32), ("largest", c_float), ("log_normalizer", c_double))


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "swarmd_abi": (c_int32, ()),
    "swarmd_isa": (c_char_p, ()),
    "swarmd_select": (c_int32, (c_char_p,)),
    "swarmd_pool_new": (c_void_p, (c_int32,)),
    "swarmd_pool_free": (None, (c_void_p,)),
    "swarmd_pack": (None, (c_int32, c_int32, c_int32, c_void_p, c_void_p)),
    "swarmd_pack_numbers": (None, (c_int32, c_int32, c_int32, c_void_p, c_void_p)),
    "swarmd_rows": (None, (POINTER(Matrix), c_void_p, c_int32, c_void_p)),
    "swarmd_linear": (None, (c_void_p, POINTER(Matrix), c_void_p, c_int32, c_void_p, c_void_p)),
    "swarmd_linear_workspace": (c_size_t, (POINTER(Matrix), c_int32)),
    "swarmd_workspace": (c_size_t, (c_void_p, POINTER(Stage), c_int32, c_int32, c_int32)),
    "swarmd_step": (None, (c_void_p, POINTER(Stage), POINTER(Batch), c_void_p, c_int32)),
    "swarmd_summarize": (None, (c_void_p, c_int32, c_int32, POINTER(Summary))),
}


def find() -> Path:
    """Where the library was built. Raises NativeMissing."""
    if given := os.environ.get(LIBRARY_VARIABLE):
        return Path(given)
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            return path
    raise NativeMissing("the native kernels were not built when swarmd was installed (no C++ compiler?)")


@cache
def load() -> ctypes.CDLL:
    """The library, its functions typed. Raises NativeMissing."""
    path = find()
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeMissing(f"the native kernels cannot be loaded: {error}") from error
    if (found := library.swarmd_abi()) != ABI:
        raise NativeMissing(f"{path} has interface {found}, not {ABI}; install swarmd again")
    return library


def isa() -> str:
    """The code path in use: "avx512-vnni", "avx2", "neon-dotprod" or "portable". Raises NativeMissing."""
    return load().swarmd_isa().decode()


def select(path: str) -> bool:
    """Use another code path from now on; False when this machine lacks it. For tests and measurements."""
    return load().swarmd_select(path.encode()) == 0
