"""Whatever happens to a model file's header, the reader either reads it or raises ModelFileError, in bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.node.models.gguf import GGUFFile, ModelFileError

# The honest header takes about 0.3 MB of Python objects; no damage may make it more than a few times that.
MEMORY_BOUND = 8 << 20


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    path = write_tiny_gguf(tmp_path_factory.mktemp("damage") / "tiny.gguf", TinyModel(n_layers=1))
    with GGUFFile.open(path) as file:
        return path.with_name("damaged.gguf"), path.read_bytes(), file.header_bytes


def opens_or_refuses(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with GGUFFile.open(path) as file:
            for name, info in file.tensors.items():
                assert len(file.read(name)) == info.nbytes
        return True
    except ModelFileError as error:
        assert str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_BOUND


many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(data=st.data())
def test_changed_bytes(original: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, content, header = original
    damaged = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        damaged[position] = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
    opens_or_refuses(path, bytes(damaged))


@many
@given(data=st.data())
def test_truncation_anywhere_is_refused(original: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, content, _ = original
    # Up to 31 bytes of padding may be lost without loss.
    length = data.draw(st.integers(0, len(content) - 32))
    assert not opens_or_refuses(path, content[:length])


@many
@given(noise=st.binary(max_size=400))
def test_noise_behind_the_magic(original: tuple[Path, bytes, int], noise: bytes) -> None:
    opens_or_refuses(original[0], b"GGUF\x03\0\0\0" + noise)


def test_every_single_byte_of_the_structure(original: tuple[Path, bytes, int]) -> None:
    """Each byte of the preamble, the first keys and the tensor table set to 0xFF and to 0."""
    path, content, header = original
    for position in (*range(200), *range(header - 400, header)):
        for value in (0, 0xFF):
            opens_or_refuses(path, content[:position] + bytes([value]) + content[position + 1 :])
