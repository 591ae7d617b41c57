"""The ways in which GGUF files hold the same tensors: in shards, stacked, fused, quantized. And what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import CASES

from swarmd.node.engine.quantized import form_of
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.heads import described_by, head_sizes
from swarmd.node.models.layout import layout_of

Arrays = dict[str, np.ndarray]


def rewritten(source: Path, target: Path, change: Callable[[Arrays], Mapping[str, np.ndarray]]) -> Path:
    """A copy of an F32 file whose tensors went through `change`."""
    with GGUFFile.open(source) as file:
        tensors = {name: file.read(name).view("<f4").reshape(info.shape) for name, info in file.tensors.items()}
        writer = gguf.GGUFWriter(target, str(file.metadata["general.architecture"]))
        for key, value in file.metadata.items():
            _add(writer, key, value)
        for name, values in change(tensors).items():
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def all_values(path: Path) -> Arrays:
    with open_checkpoint(path) as checkpoint:
        checkpoint.check(0, checkpoint.spec.n_layers)
        return {name: checkpoint.read(name).dequantize() for name in names_of(checkpoint)}


def names_of(checkpoint: Checkpoint) -> list[str]:
    return list(tensor_shapes(checkpoint.spec, 0, checkpoint.spec.n_layers))


def assert_same(got: Arrays, expected: Arrays) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(got[name], values), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf_of(CASES["llama biases"](), tmp_path_factory.mktemp("layouts") / "llama.gguf")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf_of(CASES["mixtral"](), tmp_path_factory.mktemp("layouts") / "mixtral.gguf")


def test_fused_qkv_is_split_before_its_rows_are_put_back(llama: Path, tmp_path: Path) -> None:
    def fuse(tensors: Arrays) -> Arrays:
        for layer in range(4):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
        return tensors

    assert_same(all_values(rewritten(llama, tmp_path / "fused.gguf", fuse)), all_values(llama))


def test_experts_by_themselves_as_old_files_have_them(mixtral: Path, tmp_path: Path) -> None:
    def unstack(tensors: Arrays) -> Arrays:
        for layer in range(4):
            for part in ("gate", "up", "down"):
                for expert, values in enumerate(tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight")):
                    tensors[f"blk.{layer}.ffn_{part}.{expert}.weight"] = values
        return tensors

    assert_same(all_values(rewritten(mixtral, tmp_path / "old.gguf", unstack)), all_values(mixtral))


def test_experts_with_gate_and_up_in_one(mixtral: Path, tmp_path: Path) -> None:
    def fuse(tensors: Arrays) -> Arrays:
        for layer in range(4):
            parts = [tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
            tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
        return tensors

    assert_same(all_values(rewritten(mixtral, tmp_path / "fused.gguf", fuse)), all_values(mixtral))


@pytest.mark.parametrize(
    ("case", "kind"), [("gpt-oss", Type.MXFP4), ("mixtral", Type.Q4_0), ("phi3", Type.Q8_0), ("qwen2moe", Type.Q5_1)]
)
def test_parts_of_quantized_tensors_are_cut_between_blocks(case: str, kind: Type, tmp_path: Path) -> None:
    model = CASES[case]()
    path = write_gguf_of(model, tmp_path / "q.gguf", kind=kind)
    plain = all_values(write_gguf_of(model, tmp_path / "f.gguf"))
    with open_checkpoint(path) as checkpoint:
        checkpoint.check(0, checkpoint.spec.n_layers)
        for name, shape in tensor_shapes(checkpoint.spec, 0, checkpoint.spec.n_layers).items():
            weight, form = checkpoint.read(name), checkpoint.form(name)
            assert form == form_of(weight)
            if len(shape) == 1:
                assert np.array_equal(weight.dequantize(), plain[name])
                continue
            assert weight.nbytes == form.nbytes(*shape)
            # Rows are quantized by themselves, so a part of the quantized whole is the part, quantized.
            expected = gguf.dequantize(gguf.quantize(np.ascontiguousarray(plain[name]), kind), kind)
            assert np.array_equal(weight.dequantize(), expected), name


def test_shards_are_one_model_whichever_is_named(tmp_path: Path) -> None:
    model = CASES["qwen3"]()
    write_gguf_of(model, tmp_path / "m.gguf", split_max_tensors=10)
    whole = write_gguf_of(model, tmp_path / "whole.gguf")
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) > 3
    expected = all_values(whole)
    for shard in shards:
        assert_same(all_values(shard), expected)


def test_stages_name_the_shards_that_hold_them(tmp_path: Path) -> None:
    write_gguf_of(CASES["llama"](), tmp_path / "m.gguf", split_max_tensors=10)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    by_name = {f"model-{i:05}-of-{len(shards):05}.gguf": path for i, path in enumerate(shards, 1)}
    with open_checkpoint(shards[0]) as checkpoint:
        held: set[str] = set()
        for layer in range(checkpoint.spec.n_layers):
            ranges = checkpoint.stage_ranges(layer, layer + 1)
            held |= {part.file for part in ranges}
            for part in ranges:
                with GGUFFile.open(by_name[part.file]) as file:
                    assert (part.offset, part.nbytes) in {(i.offset, i.nbytes) for i in file.tensors.values()}
    assert held == set(by_name)


def test_a_stage_reads_only_its_ranges_of_sparse_shards(tmp_path: Path) -> None:
    """Everything outside heads and ranges may be holes."""
    write_gguf_of(CASES["llama"](), tmp_path / "m.gguf", split_max_tensors=10)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    with open_checkpoint(shards[0]) as checkpoint:
        wanted = tensor_shapes(checkpoint.spec, 1, 2)
        expected = {name: checkpoint.read(name).dequantize() for name in wanted}
        ranges = checkpoint.stage_ranges(1, 2)
    (tmp_path / "sparse").mkdir()
    for number, shard in enumerate(shards, 1):
        with GGUFFile.open(shard) as file, (tmp_path / "sparse" / shard.name).open("wb") as copy:
            data = shard.read_bytes()
            copy.truncate(len(data))
            copy.write(data[: file.header_bytes])
            for part in ranges:
                if part.file == f"model-{number:05}-of-{len(shards):05}.gguf":
                    copy.seek(part.offset)
                    copy.write(data[part.offset : part.offset + part.nbytes])
    with open_checkpoint(tmp_path / "sparse" / shards[0].name, sparse=True) as checkpoint:
        checkpoint.check(1, 2)
        assert_same({name: checkpoint.read(name).dequantize() for name in wanted}, expected)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name, case in (("a", "llama"), ("b", "phi3")):
        (tmp_path / name).mkdir()
        write_gguf_of(CASES[case](), tmp_path / name / "m.gguf", split_max_tensors=20)
    ours, theirs = sorted((tmp_path / "a").iterdir()), sorted((tmp_path / "b").iterdir())
    assert len(ours) == len(theirs)
    second = ours[1].read_bytes()
    ours[1].write_bytes(ours[0].read_bytes())
    with pytest.raises(ModelFileError, match="says that it is shard 0"):
        open_checkpoint(ours[0])
    ours[1].write_bytes(theirs[1].read_bytes())
    with pytest.raises(ModelFileError, match=r"both have tensor|should hold"):
        open_checkpoint(ours[0])
    ours[1].write_bytes(second)
    ours[-1].unlink()
    with pytest.raises(ModelFileError, match=rf"{ours[-1].name}.*missing"):
        open_checkpoint(ours[0])


def test_long_rope_factors_are_part_of_the_head(tmp_path: Path) -> None:
    """A node that has no other tensors can read the architecture."""
    path = write_gguf_of(CASES["phi3 long"](), tmp_path / "m.gguf")
    data = path.read_bytes()
    layout = layout_of(path)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
    head, described = head_sizes(layout)[0], described_by(layout)
    assert {nbytes for _, _, nbytes in described} == {6 * 4}
    with path.open("wb") as opened:
        opened.truncate(len(data))
        for _, offset, nbytes in [("", 0, head), *described]:
            opened.seek(offset)
            opened.write(data[offset : offset + nbytes])
    with open_checkpoint(path, sparse=True) as checkpoint:
        assert checkpoint.spec == spec


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "blk.2.attn_v.bias"}, r"lacks tensor 'blk\.2\.attn_v\.bias'"),
        (lambda t: {**t, "blk.1.attn_q_norm.weight": t["output_norm.weight"]}, r"'blk\.1\.attn_q_norm\.weight'"),
        (lambda t: {**t, "blk.4.attn_norm.weight": t["output_norm.weight"]}, r"'blk\.4\.attn_norm\.weight', which"),
        (lambda t: {**t, "output.bias": t["output_norm.weight"]}, r"'output\.bias', which llama models are not"),
        (lambda t: {**t, "blk.1.ffn_up.weight": t["blk.1.ffn_up.weight"][:-1]}, r"shape \(95, 64\); .*\(96, 64\)"),
        (lambda t: {**t, "blk.1.attn_q.weight": t["blk.1.attn_q.weight"][None]}, None),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    llama: Path, tmp_path: Path, change: Callable[[Arrays], Arrays], says: str | None
) -> None:
    path = rewritten(llama, tmp_path / "changed.gguf", change)
    if says is None:  # leading dimensions of one do not matter
        assert_same(all_values(path), all_values(llama))
        return
    with pytest.raises(ModelFileError, match=says):
        all_values(path)
