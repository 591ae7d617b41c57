"""Targets: model files of any origin, from their headers to what the engine and the tokenizer are built from."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import msgspec
import numpy as np
from fuzz.engine import Target
from fuzz.mutate import INTERESTING, mutate
from fuzz.trees import change, junk
from support.tiny_gguf import CHAT_TEMPLATE, TinyModel, write_tiny_gguf
from support.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata

from swarmd.node.engine.spec import ArchSpec
from swarmd.node.models.chat_template import ChatTemplate
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.front import ModelFront
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_families import FAMILIES
from swarmd.node.models.gguf_header import HeaderCursor, read_metadata
from swarmd.node.models.hf_config import spec_from_config
from swarmd.node.models.hf_families import FAMILIES as HF_FAMILIES
from swarmd.node.models.hf_quantized import packing_of
from swarmd.node.models.safetensors_file import NUMPY_TYPES, SafetensorsFile
from swarmd.node.models.sentencepiece_model import read_model
from swarmd.node.models.tokenizer import Tokenizer

_TEXT = "the é 😀 <s> <|im_end|> 12"
_PATHS = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
_PADDING = 1 << 18
"""Bytes behind a header, a hole in the file: the tensors' place."""
GGUF_SIZES: dict[str, Any] = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
    "vocab_size": 50,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "attention.sliding_window": 16,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
    "rope.dimension_sections": [4, 4],
}
_NUMBER_TYPES = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "Q": 10, "q": 11, "d": 12}


def _directory() -> Path:
    return Path(mkdtemp(prefix="swarmd-fuzz-", dir=_PATHS))


class Gguf(Target):
    """GGUF files: the header, the architecture, the tensor table against it, costs; bytes and meanings damaged."""

    name = "gguf"
    errors = (ModelFileError,)
    memory = 8 << 20
    memory_per_byte = 128

    def __init__(self) -> None:
        self._folder = _directory()
        self._path = self._folder / "fuzzed.gguf"

    def seeds(self) -> list[bytes]:
        tiny = write_tiny_gguf(self._path, TinyModel(n_layers=2, rope_factors=True))
        with GGUFFile.open(tiny) as file:
            headers = [tiny.read_bytes()[: file.header_bytes]]
        for architecture in sorted(FAMILIES):
            metadata = {f"{architecture}.{key}": value for key, value in GGUF_SIZES.items()}
            headers.append(gguf_header({"general.architecture": architecture, **metadata}, _tensors()))
        return headers

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.45:
            return mutate(random, random.choice(pool), random.choice(pool))
        architecture = random.choice(sorted(FAMILIES))
        values = {key: value for key, value in GGUF_SIZES.items() if random.random() < 0.9}
        for _ in range(random.randrange(4)):
            key = random.choice(list(GGUF_SIZES))
            values[key] = change(random, values[key]) if key in values else junk(random)
        metadata = {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in values.items()}
        tensors = _tensors()
        for _ in range(random.randrange(4)):
            tensors = change(random, tensors)
        return gguf_header(metadata, tensors)

    def run(self, data: bytes) -> str:
        _write(self._path, data, _PADDING)
        with GGUFFile.open(self._path) as file:
            for info in list(file.tensors.values())[:50]:
                assert info.offset + info.nbytes <= file.size
                assert len(file.read(info.name)) == info.nbytes
        with open_checkpoint(self._path) as checkpoint:
            _check_spec(checkpoint.spec)
            checkpoint.check(0, checkpoint.spec.n_layers)
            checkpoint.stage_ranges(0, 1)
        return f"opens as {checkpoint.spec.architecture}"

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class GgufTokenizers(Target):
    """The tokenizer and the chat template that a GGUF header's metadata describe, and texts through them."""

    name = "gguf tokenizer"
    errors = (ModelFileError,)
    memory = 8 << 20
    memory_per_byte = 2400  # what jinja2 takes to compile a character; MAX_TEMPLATE and MAX_NODES bound it
    share = 0.25

    def seeds(self) -> list[bytes]:
        pieces = ["▁the", "the", "▁", "t", "h", "e", "é", "▁t", "he"]
        described = [
            byte_level_metadata(),
            byte_level_metadata(**{"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}),
            sentencepiece_metadata(pieces),
            sentencepiece_metadata(pieces, **{"tokenizer.ggml.add_space_prefix": False}),
        ]
        return [gguf_header({**one, "tokenizer.chat_template": CHAT_TEMPLATE}, []) for one in described]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.4:
            return mutate(random, random.choice(pool), random.choice(pool))
        metadata = random.choice((byte_level_metadata(), sentencepiece_metadata(["▁the", "▁", "t", "h", "e"])))
        metadata["tokenizer.chat_template"] = CHAT_TEMPLATE
        for _ in range(random.choice((1, 1, 2, 3))):
            metadata = change(random, metadata)
        return gguf_header(metadata if isinstance(metadata, dict) else {}, [])

    def run(self, data: bytes) -> str:
        cursor = HeaderCursor(data, "fuzzed.gguf")
        cursor.take(16)
        metadata = read_metadata(cursor, cursor.u64())
        tokenizer = Tokenizer.from_gguf(metadata)
        template = ChatTemplate.from_gguf(metadata, tokenizer)
        return _use(ModelFront(tokenizer, template))


class Safetensors(Target):
    """Headers of safetensors files, as bytes and as JSON."""

    name = "safetensors"
    errors = (ModelFileError,)
    memory_per_byte = 256

    def __init__(self) -> None:
        self._folder = _directory()
        self._path = self._folder / "fuzzed.safetensors"

    def seeds(self) -> list[bytes]:
        return [safetensors_header(_described(Random(number))) for number in range(12)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.4:
            return mutate(random, random.choice(pool), random.choice(pool))
        described: Any = _described(random)
        for _ in range(random.randrange(3)):
            described = change(random, described)
        data = safetensors_header(described)
        if random.random() < 0.1:
            lie = random.choice((*INTERESTING, len(data) - 9, len(data) - 7)) % (1 << 64)
            data = lie.to_bytes(8, "little") + data[8:]
        return data

    def run(self, data: bytes) -> str:
        header = int.from_bytes(data[:8], "little")
        described = _json(data[8 : 8 + header]) if header < 1 << 20 else None
        _write(self._path, data, _described_bytes(described))
        file = SafetensorsFile(self._path)
        for name, info in list(file.tensors.items())[:50]:
            assert file.header_bytes <= info.offset <= info.offset + info.nbytes <= file.size
            values = file.read(name)
            assert values.nbytes == info.nbytes
            if info.shape and info.shape[0] > 1:
                assert np.array_equal(file.read(name, 1), values[1:])
        return f"{min(len(file.tensors), 5)} tensors"

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


HF_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale_all_dim": 1.0},
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 50.0,
    "embedding_multiplier": 6.0,
    "logits_scaling": 3.0,
    "torch_dtype": "float32",
    "eos_token_id": [2, 3],
}
QUANTIZATIONS: tuple[dict[str, Any], ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    {"group_size": 32, "bits": 4, "mode": "affine", "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 8}},
)


def hf_config(random: Random) -> dict[str, Any]:
    """A config.json of some family; most keys of its own are there, and some of others."""
    config = {key: value for key, value in HF_SIZES.items() if random.random() < 0.75}
    config["model_type"] = random.choice(sorted(HF_FAMILIES))
    if random.random() < 0.3:
        config[random.choice(("quantization_config", "quantization"))] = random.choice(QUANTIZATIONS)
    return config


class Configs(Target):
    """config.json alone: architecture and quantization."""

    name = "config.json"
    errors = (ModelFileError,)
    memory = 16 << 20
    memory_per_byte = 256

    def seeds(self) -> list[bytes]:
        return [json.dumps(hf_config(Random(number))).encode() for number in range(60)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.1:
            return mutate(random, random.choice(pool), random.choice(pool))
        known = _json(random.choice(pool))
        config: Any = known if isinstance(known, dict) and random.random() < 0.5 else hf_config(random)
        for _ in range(random.randrange(4)):
            config = change(random, config)
        return json.dumps(config).encode()

    def run(self, data: bytes) -> str:
        config = _json(data)
        if not isinstance(config, dict):
            return "no object"
        _check_spec(spec := spec_from_config(config))
        packing_of(config)
        return f"{spec.architecture}, {len(spec.ropes)} ropes"


class Folders(Target):
    """A whole folder with one or two of its files damaged: layout, index, weights, configuration, tokenizer, template.

    An input is a msgpack map of file names to contents.
    """

    name = "folder"
    errors = (ModelFileError,)
    memory = 16 << 20
    memory_per_byte = 512
    share = 0.25

    def __init__(self) -> None:
        self._root = _directory()
        self._folder = self._root / "model"
        self._files: dict[str, bytes] = {}

    def seeds(self) -> list[bytes]:
        from support.model_folders import write_llama_folder

        if not self._folder.exists():
            write_llama_folder(self._folder, TinyModel(n_layers=1, vocab_size=400), shards=2)
            extra = {
                "generation_config.json": {"eos_token_id": [2]},
                "special_tokens_map.json": {"bos_token": {"content": "<|bos|>"}, "unk_token": "<unk>"},
                "added_tokens.json": {"<think>": 397},
            }
            for name, content in extra.items():
                (self._folder / name).write_text(json.dumps(content))
            self._files = {path.name: path.read_bytes() for path in self._folder.iterdir()}
        return [msgspec.msgpack.encode(self._files)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        files = dict(self._files)
        names = [name for name in files if random.random() < 0.8 or not name.endswith(".safetensors")]
        for _ in range(random.choice((1, 1, 1, 2))):
            name = random.choice(names)
            files[name] = self._damaged(random, name, files[name])
        if random.random() < 0.1:
            del files[random.choice(list(files))]
        return msgspec.msgpack.encode(files)

    def _damaged(self, random: Random, name: str, content: bytes) -> bytes:
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(content[:8], "little")
            described = change(random, _json(content[8:end])) if random.random() < 0.6 else None
            if described is not None:
                return safetensors_header(described) + content[end:]
            return mutate(random, content[:end], content[:end]) + content[end:]
        value = _json(content)
        if value is not None and random.random() < 0.8:
            return json.dumps(change(random, value)).encode()
        return mutate(random, content, random.choice(list(self._files.values()))[:4096])

    def run(self, data: bytes) -> str:
        try:
            files = msgspec.msgpack.decode(data, type=dict[str, bytes])
        except msgspec.DecodeError:
            return "no input"
        for name, content in self._files.items():
            if files.get(name) is None:
                (self._folder / name).unlink(missing_ok=True)
            elif files[name] != content or not (self._folder / name).exists():
                (self._folder / name).write_bytes(files[name])
        try:
            return self._load()
        finally:
            for name, content in self._files.items():
                if files.get(name) != content:
                    (self._folder / name).write_bytes(content)

    def _load(self) -> str:
        refusal, outcome = None, ""
        try:
            with open_checkpoint(self._folder) as checkpoint:
                _check_spec(checkpoint.spec)
                checkpoint.check(0, checkpoint.spec.n_layers)
                checkpoint.stage_ranges(0, 1)
            outcome = "opens, "
        except ModelFileError as error:
            refusal = error
        outcome += _use(ModelFront.load(self._folder))
        if refusal is not None:
            raise refusal
        return outcome

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


class SentencePiece(Target):
    """tokenizer.model: SentencePiece's protobuf."""

    name = "sentencepiece"
    errors = (ModelFileError,)
    memory_per_byte = 256

    def seeds(self) -> list[bytes]:
        pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁the", -1.0, 1), ("t", -2.0, 1)]
        body = b"".join(_field(1, _piece(*piece)) for piece in pieces)
        trainers = (b"", _varint(3, 1) + _varint(4, 5), _varint(3, 2) + _varint(40, 0) + _varint(41, 1))
        normalizers = (b"", _varint(3, 0) + _varint(4, 1), _field(2, b"\0" * 40) + _field(1, b"identity"))
        return [body + _field(2, t) + _field(3, n) for t in trainers for n in normalizers]

    def run(self, data: bytes) -> str:
        model = read_model(Path("tokenizer.model"), data)
        assert len(model.tokens) == len(model.scores) == len(model.types)
        return f"{model.kind}, {min(len(model.tokens), 4)} tokens"


def gguf_header(metadata: dict[str, Any], tensors: Any) -> bytes:
    """A GGUF header, version 3, of whatever values; tensors are [name, sizes, type, offset]. What has no type in the
    format becomes text."""
    pairs = b"".join(_gguf_text(str(key)) + _gguf_value(value) for key, value in metadata.items())
    table = b"".join(_gguf_tensor(tensor) for tensor in tensors) if isinstance(tensors, list) else b""
    count = len(tensors) if isinstance(tensors, list) else 1
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata)) + pairs + table


def _gguf_text(text: str) -> bytes:
    data = text.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data


def _gguf_value(value: Any) -> bytes:
    if isinstance(value, list):
        kinds = {_gguf_kind(item) for item in value} or {4}
        kind = kinds.pop() if len(kinds) == 1 else 8
        items = b"".join(_gguf_plain(kind, item) for item in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    kind = _gguf_kind(value)
    return struct.pack("<I", kind) + _gguf_plain(kind, value)


def _gguf_kind(value: Any) -> int:
    if isinstance(value, bool):
        return 7
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return 4 if 0 <= value < 2**32 else 5 if -(2**31) <= value < 0 else 10 if value > 0 else 11
    return 12 if isinstance(value, float) else 8


def _gguf_plain(kind: int, value: Any) -> bytes:
    code = {number: code for code, number in _NUMBER_TYPES.items()}.get(kind)
    if code is not None:
        return struct.pack(f"<{code}", value)
    return bytes([value]) if kind == 7 else _gguf_text(str(value))


def _gguf_tensor(tensor: Any) -> bytes:
    """An entry of the table. Numbers are cut to their fields; whatever else is there is left out."""
    if not isinstance(tensor, list) or len(tensor) != 4:
        return _gguf_text(str(tensor))
    name, sizes, kind, offset = tensor
    sizes = [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []
    numbers = b"".join(struct.pack("<Q", size % 2**64) for size in sizes)
    kind, offset = (value if isinstance(value, int) else 0 for value in (kind, offset))
    return (
        _gguf_text(str(name))
        + struct.pack("<I", len(sizes))
        + numbers
        + struct.pack("<IQ", kind % 2**32, offset % 2**64)
    )


def _tensors() -> list[Any]:
    """Some tensors as the architectures have them, one behind the other."""
    shapes = {
        "token_embd.weight": [64, 50],
        "output_norm.weight": [64],
        "rope_freqs.weight": [8],
        "blk.0.attn_norm.weight": [64],
        "blk.0.attn_q.weight": [64, 64],
        "blk.0.attn_qkv.weight": [64, 128],
        "blk.0.ffn_gate_inp.weight": [64, 4],
        "blk.0.ffn_up_exps.weight": [64, 32, 4],
        "blk.1.exp_probs_b.bias": [4],
        "blk.0.ffn_up_shexp.weight": [64, 32],
    }
    tensors: list[Any] = []
    offset = 0
    for name, sizes in shapes.items():
        tensors.append([name, sizes, 0, offset])
        offset += 4 * int(np.prod(sizes))
    return tensors


def safetensors_header(described: Any) -> bytes:
    """Length and JSON."""
    header = json.dumps(described).encode()
    return len(header).to_bytes(8, "little") + header


def _described(random: Random) -> dict[str, Any]:
    """A sound header."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}} if random.random() < 0.5 else {}
    offset = 0
    for number in range(random.randrange(6)):
        dtype = random.choice(sorted(NUMPY_TYPES))
        shape = [random.randrange(5) for _ in range(random.randrange(4))]
        end = offset + int(np.prod(shape, dtype=int)) * np.dtype(NUMPY_TYPES[dtype]).itemsize
        described[f"model.layers.{number}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return described


def _described_bytes(described: Any) -> int:
    """How many bytes of tensors a header speaks of, if that is a size that a file may have."""
    ends = [0]
    for entry in described.values() if isinstance(described, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and offsets and isinstance(offsets[-1], int):
            ends.append(offsets[-1])
    return max(ends) if 0 <= max(ends) <= 1 << 20 else 100


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind)


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _varint(number: int, value: int) -> bytes:
    return _number(number << 3) + _number(value)


def _number(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def _write(path: Path, data: bytes, more: int) -> None:
    """The file's content, and behind it a hole of so many bytes."""
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + more)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _check_spec(spec: ArchSpec) -> None:
    assert spec.n_heads % spec.n_kv_heads == 0
    assert all(layer.rope is None or layer.rope < len(spec.ropes) for layer in spec.layers)


def _use(front: ModelFront) -> str:
    ids = front.encode_text(_TEXT)
    assert all(0 <= number < front.tokenizer.vocab_size for number in ids)
    front.tokenizer.decode(ids)
    try:
        front.encode_rendered(front.render([{"role": "user", "content": _TEXT}]))
    except ValueError:  # TemplateError is one
        return "a tokenizer, no template"
    return "a tokenizer"
