"""Weights from a Hugging Face directory: config.json and one or more .safetensors files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from ...kernels.weights import StoredWeight
from ..spec import ModelError
from .dequantize import FLOAT_DTYPES
from .hf_spec import read_hf_spec
from .jsonfile import read_json_object
from .layout import check_shapes, check_spec
from .quantized_layout import open_quantized
from .quantized_weight import typed_view
from .safetensors_file import SafetensorsEntry, SafetensorsFile
from .stored import MappedWeight, map_bytes

INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """An opened Hugging Face directory. See `WeightSource`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[SafetensorsFile] = []
        self._entries: dict[str, tuple[SafetensorsEntry, int]] = {}
        try:
            for path in weight_files(directory):
                self._add(path)
            self._bytes: list[torch.Tensor] = [map_bytes(file.data) for file in self._files]
            stored = {name: entry for name, (entry, _) in self._entries.items()}
            self._quantized = open_quantized(directory, stored, self._tensor)
            self._names = self._quantized.names(stored)
            self.spec = read_hf_spec(directory, self._names)
            check_spec(self.spec, directory)
            shapes = {name: entry.shape for name, entry in stored.items()} | self._quantized.shapes()
            check_shapes(self.spec, ((name, shapes[name]) for name in self._names), directory)
        except BaseException:
            self.close()
            raise

    def names(self) -> Collection[str]:
        return self._names

    def weight(self, name: str) -> StoredWeight:
        """Raises ModelError naming the tensor if it is absent or no float, or if the source is closed."""
        quantized = self._quantized.layouts.get(name)
        if quantized is not None:
            return quantized.open(self._tensor)
        found = self._entries.get(name)
        if found is None:
            raise ModelError(f"{self._directory.name}: tensor {name} is missing; download the whole model again")
        entry, index = found
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{self._directory.name}: tensor {name} is stored as {entry.dtype}, which is not supported "
                "(F32, F16 and BF16 are); use the unquantised model"
            )
        return MappedWeight(name=name, shape=entry.shape, encoding=entry.dtype, data=self._data(entry, index))

    def _tensor(self, name: str) -> torch.Tensor:
        """A tensor as its file holds it; a view."""
        return typed_view(self._data(*self._entries[name]), self._entries[name][0])

    def _data(self, entry: SafetensorsEntry, index: int) -> torch.Tensor:
        if not self._bytes:
            raise ModelError(f"{self._directory.name}: already closed; open the directory again")
        return self._bytes[index][entry.offset : entry.offset + entry.num_bytes]

    def close(self) -> None:
        """Let go of the files. Weights already handed out stay valid."""
        self._bytes = []
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()

    def _add(self, path: Path) -> None:
        file = SafetensorsFile(path)
        self._files.append(file)
        for name, entry in file.entries.items():
            if name in self._entries:
                raise ModelError(
                    f"{self._directory.name}: tensor {name[:100]!r} is in more than one file; "
                    f"remove the files that do not belong to the model, or restore {INDEX}"
                )
            self._entries[name] = (entry, len(self._files) - 1)


def weight_files(directory: Path) -> list[Path]:
    """The files that make up the model: what the index lists, else model.safetensors, else all there are."""
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    single = directory / "model.safetensors"
    # consolidated*: the same weights again in their maker's own layout; adapter*: a LoRA.
    others = [path for path in directory.glob("*.safetensors") if not path.name.startswith(("consolidated", "adapter"))]
    files = [single] if single.is_file() else sorted(others)
    if not files:
        raise ModelError(f"{directory} holds no .safetensors file; download the whole model again")
    return files


def _indexed_files(directory: Path) -> list[Path]:
    weight_map = read_json_object(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{INDEX} has no weight_map; download it again")
    names: set[str] = set()
    for name in weight_map.values():
        # A plain name, so that an index cannot point outside its directory.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ModelError(
                f"{INDEX} names {str(name)[:100]!r}, which is no file of this directory; download it again"
            )
        names.add(name)
    return [directory / name for name in sorted(names)]


def open_safetensors(directory: Path) -> SafetensorsSource:
    """Open a directory with config.json and safetensors; reads and checks headers only. Raises ModelError."""
    return SafetensorsSource(directory)
