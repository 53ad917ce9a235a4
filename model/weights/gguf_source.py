"""Weights from a GGUF file, under Hugging Face's names and in its layout."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ...kernels.weights import StoredWeight
from ..spec import ModelError
from .gguf_families import GgufFamily
from .gguf_file import GgufFile, GgufTensor
from .gguf_spec import gguf_family, read_gguf_spec
from .layout import check_shapes, check_spec
from .stored import MappedWeight, ShiftedWeight, map_bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    tensor: GgufTensor
    interleaved_heads: int
    expert: int | None = None
    """The tensor holds a matrix of each expert; this one is meant."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes if self.expert is None else self.tensor.num_bytes // self.tensor.shape[0]

    @property
    def offset(self) -> int:
        return self.tensor.offset + (self.expert or 0) * self.num_bytes


class GgufSource:
    """An opened GGUF file. See `WeightSource`."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        try:
            self.spec = read_gguf_spec(self._file)
            check_spec(self.spec, path)
            self._family = gguf_family(self._file)
            self._entries = self._index(self._family)
            check_shapes(self.spec, ((name, entry.shape) for name, entry in self._entries.items()), path)
            self._bytes = map_bytes(self._file.data)
        except BaseException:
            self._file.close()
            raise
        # Vocabulary and merges are the tokenizer's, in another process; here they only take memory.
        self._file.metadata.clear()

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def weight(self, name: str) -> StoredWeight:
        """Raises ModelError naming the tensor if it is absent, or if the source is closed."""
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self._file.path.name}: tensor {name} is missing; download the whole model again")
        if self._bytes.numel() == 0:
            raise ModelError(f"{self._file.path.name}: already closed; open the file again")
        stored = MappedWeight(
            name=name,
            shape=entry.shape,
            encoding=entry.tensor.encoding,
            data=self._bytes[entry.offset : entry.offset + entry.num_bytes],
            interleaved_heads=entry.interleaved_heads,
        )
        if self._family.norm_offset and name.endswith("norm.weight"):
            return ShiftedWeight(stored, self._family.norm_offset)
        return stored

    def close(self) -> None:
        """Let go of the file. Weights already handed out stay valid."""
        self._bytes = self._bytes.new_empty(0)
        self._file.close()

    def _index(self, family: GgufFamily) -> dict[str, _Entry]:
        """Canonical name → tensor. A tensor that the family does not know changes what the model computes: refused."""
        entries: dict[str, _Entry] = {}
        for name, tensor in self._file.tensors.items():
            if name in family.ignored:
                continue
            canonical = family.canonical_name(name)
            if canonical is None or self._layer_of(canonical) >= self.spec.num_hidden_layers:
                raise ModelError(
                    f"{self._file.path.name}: tensor {name[:100]!r} is not part of a {family.architecture}; "
                    "this variant of the model is not supported, choose another"
                )
            if "{}" in canonical:
                for expert in range(self._checked_experts(tensor)):
                    entries[canonical.format(expert)] = _Entry(tensor, 0, expert)
            else:
                entries[canonical] = _Entry(tensor, self._interleaved_heads(family, name))
        return entries

    def _checked_experts(self, tensor: GgufTensor) -> int:
        """How many matrices the tensor holds."""
        experts = self.spec.experts
        if experts is None or len(tensor.shape) != 3 or tensor.shape[0] != experts.num_experts:
            raise ModelError(
                f"{self._file.path.name}: tensor {tensor.name[:100]!r} is {list(tensor.shape)}, which is no matrix for "
                "each expert; convert the model to GGUF again"
            )
        return experts.num_experts

    def _interleaved_heads(self, family: GgufFamily, name: str) -> int:
        leaf = name.split(".", 2)[-1]
        if leaf in family.interleaved_query:
            return self.spec.num_attention_heads
        if leaf in family.interleaved_key:
            return self.spec.num_key_value_heads
        return 0

    @staticmethod
    def _layer_of(canonical: str) -> int:
        parts = canonical.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file; reads and checks its header only. Raises ModelError."""
    return GgufSource(path)
