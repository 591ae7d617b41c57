"""A folder of safetensors in Hugging Face's form as a `Checkpoint`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from swarmd.node.engine.quantized import DenseWeight, Weight, WeightForm
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import FileRange
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.folder_files import MIB, read_json
from swarmd.node.models.hf_config import family_of, rotates_neighbours, spec_from_config
from swarmd.node.models.hf_latent import row_order
from swarmd.node.models.hf_names import HARMLESS, Places, Source
from swarmd.node.models.hf_quantized import packing_of
from swarmd.node.models.layout import layout_of
from swarmd.node.models.tensor_files import TensorFiles

MAX_CONFIG_BYTES = 16 * MIB


class HFCheckpoint:
    """See `Checkpoint`. Files are open only while they are read."""

    def __init__(self, folder: Path, config: dict[str, Any], files: TensorFiles) -> None:
        """Raises ModelFileError for an architecture or a quantization that is not supported."""
        self.name = folder.name
        self.spec = spec_from_config(config)
        self._files = files
        self._packing = packing_of(config)
        self._plus_one = family_of(config).norm_plus_one
        self._reordered = rotates_neighbours(config)
        places = Places(self.spec, family_of(config), self._has)
        self._prefix = places.prefix()
        self._shapes = tensor_shapes(self.spec, 0, self.spec.n_layers)
        self._sources = {name: places.find(name, shape, self._prefix) for name, shape in self._shapes.items()}

    @classmethod
    def open(cls, folder: Path, *, sparse: bool = False) -> HFCheckpoint:
        """See `open_checkpoint`."""
        layout = layout_of(folder)
        config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
        if config is None:
            raise ModelFileError(
                f"{folder} has no config.json; give a folder as Hugging Face's or MLX's tools write it"
            )
        weights = [(file.name, file.path) for file in layout.files if file.name.endswith(".safetensors")]
        return cls(folder, config, TensorFiles(weights, sparse=sparse))

    def form(self, tensor: str) -> WeightForm:
        """See `Checkpoint`."""
        return self._packing.form(self._source(tensor), self._files)

    def stored_bytes(self, tensor: str) -> int:
        """See `Checkpoint`. Of a tensor that holds more than this one, its share."""
        source = self._source(tensor)
        return self._bytes(source) * source.rows // (source.total * max(source.experts, 1))

    def read(self, tensor: str) -> Weight:
        """See `Checkpoint`."""
        weight = self._packing.read(self._source(tensor), self._files)
        if self._plus_one and tensor.endswith("norm.weight"):
            return DenseWeight(weight.dequantize() + np.float32(1), "f32")
        order = row_order(self.spec, tensor) if self._reordered else None
        return weight if order is None else weight.take(order)

    def check(self, start: int, end: int) -> None:
        """See `Checkpoint`."""
        shapes = tensor_shapes(self.spec, start, end)
        for tensor, shape in shapes.items():
            source = self._source(tensor)
            found, wanted = self._packing.shape(source, self._files), (source.total, *shape[1:])
            if found != wanted:
                raise ModelFileError(
                    f"tensor {source.tensor!r} of {self.name} has shape {found}; config.json implies {wanted}"
                )
        known = {part for tensor in shapes for part in self._parts(tensor)}
        prefixes = tuple(f"{self._prefix}layers.{layer}." for layer in range(start, end))
        for name in self._files:
            if name.startswith(prefixes) and name not in known and not name.endswith(HARMLESS):
                raise ModelFileError(
                    f"{self.name} has tensor {name!r}, which {self.spec.architecture} models are not known to use"
                )

    def stage_ranges(self, start: int, end: int) -> list[FileRange]:
        """See `Checkpoint`."""
        names = {part: None for tensor in tensor_shapes(self.spec, start, end) for part in self._parts(tensor)}
        infos = [(self._files.file_of(name), self._files.info(name)) for name in names]
        return [FileRange(file, info.offset, info.nbytes) for file, info in infos]

    def close(self) -> None:
        """See `Checkpoint`."""

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _has(self, tensor: str) -> bool:
        return bool(self._packing.parts(tensor, self._files))

    def _source(self, tensor: str) -> Source:
        source = self._sources.get(tensor)
        if source is None or not self._has(source.tensor):
            missing = tensor if source is None else source.tensor
            raise ModelFileError(f"{self.name} lacks tensor {missing!r}; it is incomplete or of another kind of model")
        return source

    def _parts(self, tensor: str) -> tuple[str, ...]:
        return self._packing.parts(self._source(tensor).tensor, self._files)

    def _bytes(self, source: Source) -> int:
        return sum(self._files.info(part).nbytes for part in self._packing.parts(source.tensor, self._files))
