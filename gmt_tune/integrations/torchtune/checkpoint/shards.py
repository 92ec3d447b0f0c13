"""Tensors that each rank holds a part of, in the files of ``torch.distributed.checkpoint`` (DCP).

DCP's ``save`` and ``async_save`` meet in collectives while they write: a rank that dies leaves the others waiting, or
with an error that names nobody, and a process group without a CPU backend, such as NCCL's, cannot save beside
training. So the ranks plan together here, through DCP's planner; then each writes by itself, and rank 0 adds the
metadata when all have written. The files are DCP's, and its readers cut them for any other mesh.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    metadata,
)
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gmt_tune.masking.packing import pack_selection, unpack_selection
from gmt_tune.optim.states import to_floats


class PackedBits(NamedTuple):
    """One bit for each entry that this rank holds of a parameter, as ``pack_selection`` gives them."""

    stored: Tensor
    parameter: Tensor


class CompactValues(NamedTuple):
    """A state, 1-d, of the entries that are selected of those that this rank holds of a parameter."""

    stored: Tensor
    parameter: Tensor


Value = Tensor | PackedBits | CompactValues


class ShardWriter:
    """Writes the part of some tensors that this rank holds, and of replicas one.

    All ranks make it together, at the same point. Then each calls :meth:`write`, and rank 0 :meth:`finish`.

    Args:
        folder: for the files.
        values: by name. A plain tensor is the same on all ranks that give it.
        copy: of what this rank will write, on the CPU, so that training may change it meanwhile.
    """

    def __init__(self, folder: Path, values: Mapping[str, Value], *, copy: bool) -> None:
        # The folder is flushed as a whole; and copying ahead takes the current device's stream, which in the thread
        # that writes is not that of the tensors
        self._storage = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
        self._storage.fs = _AppendingFiles()
        self._planner = _SavePlanner(values)
        is_first = dist.get_rank() == 0
        self._planner.set_up_planner(self._planner.tensors, is_coordinator=is_first)
        self._storage.set_up_storage_writer(is_first)
        plan = self._storage.prepare_local_plan(self._planner.create_local_plan())
        plans: list = [None] * dist.get_world_size()
        dist.gather_object(plan, plans if is_first else None)
        if is_first:
            try:
                plans, self._metadata = self._planner.create_global_plan(plans)
                plans = self._storage.prepare_global_plan(plans)
            except Exception as error:  # for all ranks, which wait for their plans
                plans = [error] * len(plans)
        own: list = [None]
        dist.scatter_object_list(own, plans if is_first else None)
        if isinstance(own[0], Exception):
            raise own[0]
        self._plan = self._planner.finish_plan(own[0])
        if copy:
            self._planner.copy_data(self._plan)

    def write(self) -> bytes:
        """Write this rank's file, one tensor after the other; what :meth:`finish` needs to know of it."""
        written: list = []
        for item in self._plan.items:  # of those that it is given at once, DCP holds all copies until the last
            written += self._storage.write_data(replace(self._plan, items=[item]), self._planner).wait()
        return pickle.dumps(written)

    def finish(self, written: list[bytes]) -> None:
        """On rank 0, with what :meth:`write` gave on each rank: make what they wrote readable."""
        self._storage.finish(self._metadata, [pickle.loads(each) for each in written])


class _AppendingFiles(FileSystem):
    """Adds what is written in a further call to the same file."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode.replace("w", "a")) as stream:
            yield stream


class _SavePlanner(DefaultSavePlanner):
    """Takes bits and compact values for the entries of their parameter, so that DCP knows where they lie."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._packed = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        self._copies: dict[MetadataIndex, Any] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = []
        for name, value in self._packed.items():
            item, properties = _item(name, value.parameter), TensorProperties(dtype=value.stored.dtype)
            items.append(replace(item, tensor_data=replace(item.tensor_data, properties=properties)))
        return replace(plan, items=[*plan.items, *items])

    def copy_data(self, plan: SavePlan) -> None:
        self._copies = {item.index: _copy(self.resolve_data(item)) for item in plan.items}
        self.tensors.clear()  # which an accelerator need not hold any longer: bits are made for saving alone
        self._packed.clear()

    def resolve_data(self, write_item: WriteItem):
        if write_item.index in self._copies:
            return self._copies[write_item.index]
        if write_item.index.fqn in self._packed:
            return self._packed[write_item.index.fqn].stored
        return super().resolve_data(write_item)


class ShardReader:
    """Reads, of ``tensors`` that :class:`ShardWriter` wrote on any number of ranks, what this rank holds now."""

    def __init__(self, folder: Path) -> None:
        self._storage = FileSystemReader(folder)
        with (folder / ".metadata").open("rb") as file:
            self._metadata = _MetadataUnpickler(file).load()
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=False)
        self.tensors: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata

    def read_(self, name: str, target: Tensor) -> Tensor:
        """Fill a DTensor, or a plain tensor of the whole size; returns it.

        Raises:
            ValueError: if it cannot be cut so, as torchao's states cannot within one of their blocks.
        """
        planner = _load_planner(name, target, self._metadata)
        self._storage.read_data(planner.create_local_plan(), planner)
        return target

    def read_whole(self, name: str) -> Tensor:
        """A tensor on the CPU, all of it."""
        saved = self.tensors[name]
        return self.read_(name, torch.empty(saved.size, dtype=saved.properties.dtype))

    def read_bits(self, name: str, parameter: Tensor) -> Tensor:
        """:class:`PackedBits` of the entries that this rank holds of a parameter now."""
        return pack_selection(self._cut(name, parameter, torch.bool, lambda chunk: self._read_selected(name, chunk)))

    def read_floats(self, name: str, parameter: Tensor) -> Tensor:
        """What this rank holds now of a state that is as large as its parameter; a quantized one in float32."""
        return self._cut(name, parameter, torch.float32, lambda chunk: to_floats(self._read_stored(name, chunk)))

    def read_compact(self, name: str, bits: str, parameter: Tensor) -> Tensor:
        """:class:`CompactValues` of the entries that this rank holds of a parameter now, on the CPU.

        Args:
            name: of the values.
            bits: name of the :class:`PackedBits` that say whose values these are.
            parameter: of both.

        Returns:
            1-d: where a rank held the same entries then, what it saved, bit for bit; else the values of the selected
            entries, in float32 where they were quantized.
        """
        saved, own = self.tensors[name], _item(name, parameter).tensor_data.chunk
        if own in saved.chunks:
            return self._read_stored(name, own)
        is_selected = self._cut(bits, parameter, torch.bool, lambda chunk: self._read_selected(bits, chunk))
        values = torch.empty(int(is_selected.sum()), dtype=saved.properties.dtype)
        for chunk, theirs, ours in self._overlaps(name, own):
            is_shared = _within(theirs, self._read_selected(bits, chunk))
            stored = to_floats(self._read_stored(name, chunk))[: is_shared.numel()]  # padding is behind them
            values[_within(ours, is_selected)] = stored[is_shared]
        return values

    def _cut(self, name: str, parameter: Tensor, dtype: torch.dtype, read: Callable) -> Tensor:
        """A rank's part out of the parts that were saved, read one after the other, where DCP cannot cut these."""
        own = _item(name, parameter).tensor_data.chunk
        target = torch.empty(own.sizes, dtype=dtype)
        for chunk, theirs, ours in self._overlaps(name, own):
            target[ours] = read(chunk)[theirs]
        return target

    def _overlaps(self, name: str, own: ChunkStorageMetadata) -> Iterator[tuple[ChunkStorageMetadata, tuple, tuple]]:
        """Each part that was saved and overlaps with a rank's own, and the slices of both that they share."""
        for item in create_read_items_for_chunk_list(name, self.tensors[name], [own]):
            chunk = self.tensors[name].chunks[item.storage_index.index or 0]
            yield chunk, _slices(item.storage_offsets, item.lengths), _slices(item.dest_offsets, item.lengths)

    def _read_selected(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """The bool tensor of one part's bits."""
        return unpack_selection(self._read_stored(name, chunk), chunk.sizes.numel()).view(chunk.sizes)

    def _read_stored(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """What one rank stored of its entries, as it was: DCP knows which entries these are, not what they became."""
        planner, index, nowhere = _BytesPlanner(), MetadataIndex(name, chunk.offsets), torch.Size([0])
        item = ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)
        self._storage.read_data(LoadPlan([item]), planner)
        return torch.load(planner.loaded, map_location="cpu", weights_only=True)


class _BytesPlanner(DefaultLoadPlanner):
    """Takes in one value by the bytes that it was stored as."""

    loaded: io.BytesIO

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.loaded = value


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's metadata, a pickle, without running what somebody else may have put into it."""

    def find_class(self, module: str, name: str) -> Any:
        if module in (metadata.__name__, "torch") or (module, name) in _METADATA_NAMES:
            found = super().find_class(module, name)
            is_own = module == getattr(found, "__module__", None) == metadata.__name__
            if is_own or (module, name) in _METADATA_NAMES or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not of DCP's metadata")


_METADATA_NAMES = [
    *(("torch", "Size"), ("torch.serialization", "_get_layout")),
    *((module, f"{system}Path") for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
]


def _load_planner(name: str, target: Tensor, saved: Metadata) -> DefaultLoadPlanner:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({name: target}, saved)
    return planner


def _item(name: str, tensor: Tensor) -> Any:
    """What DCP would write of a tensor on this rank: it says where that lies in the whole."""
    return create_default_local_save_plan({name: tensor}, True).items[0]


def _slices(offsets, lengths) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(offsets, lengths, strict=True))


def _within(box: tuple[slice, ...], is_selected: Tensor) -> Tensor:
    """Of the selected entries of a bool tensor, in row-major order, which of them lie in a box: bool, 1-d."""
    inside = torch.zeros_like(is_selected)
    inside[box] = True
    return inside[is_selected]


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, also of torchao's quantized states, which have no ``clone`` in its earlier releases."""
    tensor = tensor.detach()
    if not tensor.is_cpu:
        return tensor.cpu()
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    kind: Any = type(tensor)
    names, context = tensor.__tensor_flatten__()
    return kind.__tensor_unflatten__({name: getattr(tensor, name).clone() for name in names}, context, None, None)
