"""Who touched each element of a launch's arguments, and when: how tests/scheduler.py finds unordered accesses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN_READ, PLAIN_WRITE, ATOMIC_READ, ATOMIC_WRITE = range(4)
NAMES = ("load", "store", "atomic load", "atomic")
# which earlier accesses of other programs must happen before one of each kind
CONFLICTS = {
    PLAIN_READ: (PLAIN_WRITE, ATOMIC_WRITE),
    PLAIN_WRITE: (PLAIN_READ, PLAIN_WRITE, ATOMIC_READ, ATOMIC_WRITE),
    ATOMIC_READ: (PLAIN_WRITE,),
    ATOMIC_WRITE: (PLAIN_READ, PLAIN_WRITE),
}

GAP = 1 << 16  # bytes between two arguments: what an index must jump to land in another argument unseen


class RaceError(AssertionError):
    """Two accesses of different programs conflict, and nothing orders them."""


class BoundsError(AssertionError):
    """An access outside every argument."""


class Memory:
    """Copies of the arguments, who last touched each element of them, and what each program knows of the others.

    Time is counted for each program in epochs, which its block barriers end. `knows[p, q]` is the last epoch of q
    whose accesses happen before whatever p does now; `leader[p, q]` the same for the one thread of p that does
    atomics, which has yet to learn, from a block barrier, of its own program's accesses since the last one.
    """

    def __init__(self, tensors: dict[str, Tensor], programs: Sequence[tuple[int, int, int]]):
        self.programs = programs
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise TypeError(f"{name} must be on the CPU, not on {tensor.device}")
        self._tensors = tensors
        self.unit = min((tensor.itemsize for tensor in tensors.values()), default=1)
        self._place()
        granules = len(self._inside)
        n = len(programs)
        # [kind][granule, program]: the epoch of the last access; zeros cost nothing until touched
        self._last = [np.zeros((granules, n), np.int32) for _ in NAMES]
        self._knows = np.eye(n, dtype=np.int32)
        self._leader = np.zeros((n, n), np.int32)
        self._released: dict[int, np.ndarray] = {}  # address of a cell -> what its releases published

    def stand_in(self, name: str, value: Any) -> Any:
        """Return what the kernel gets for an argument: for a tensor, one at the address of its copy."""
        if name not in self._tensors:
            return value
        begin, _ = self._spans[name]
        # at least one element, for an empty tensor has no address
        return torch.from_numpy(self._bytes[begin : begin + value.itemsize]).view(value.dtype)

    def copy_back(self) -> None:
        """Give the arguments the values that the kernel left in their copies."""
        for name, tensor in self._tensors.items():
            begin, end = self._spans[name]
            _bytes_of(tensor)[:] = self._bytes[begin:end]

    def access(self, program: int, addresses: np.ndarray, size: int, kind: int, leader: bool = False) -> None:
        """Record one operation of a program (or of its leader alone) on `size` bytes at each address; check it."""
        granules = self._granules(program, addresses, size, kind)
        known = (self._leader if leader else self._knows)[program]
        for earlier in CONFLICTS[kind]:
            unordered = self._last[earlier][granules] > known
            unordered[:, program] = False
            if unordered.any():
                granule, other = np.argwhere(unordered)[0]
                place = self.describe(self._base + int(granules[granule]) * self.unit)
                raise RaceError(
                    f"{NAMES[kind]} of {place} by program {self.programs[program]} is not ordered after the "
                    f"{NAMES[earlier]} by program {self.programs[other]}"
                )
        self._last[kind][granules, program] = self._knows[program, program]

    def block_barrier(self, program: int) -> None:
        """Order the leader's atomics and the accesses of all the program's threads, both ways."""
        np.maximum(self._knows[program], self._leader[program], out=self._knows[program])
        self._leader[program] = self._knows[program]
        self._knows[program, program] += 1

    def acquire(self, program: int, addresses: np.ndarray) -> None:
        """Teach the program's leader what the releases of these cells published."""
        for address in addresses.flat:
            if int(address) in self._released:
                np.maximum(self._leader[program], self._released[int(address)], out=self._leader[program])

    def release(self, program: int, addresses: np.ndarray) -> None:
        """Publish at these cells what the program's leader knows, beside what was published before."""
        for address in addresses.flat:
            published = self._released.setdefault(int(address), np.zeros_like(self._leader[program]))
            np.maximum(published, self._leader[program], out=published)

    def describe(self, address: int) -> str:
        """Return "name[index]" of an address, as far as an argument is near."""
        offset = address - self._base
        name = min(self._spans, key=lambda name: max(self._spans[name][0] - offset, offset - self._spans[name][1] + 1))
        tensor, (begin, end) = self._tensors[name], self._spans[name]
        if not begin - GAP < offset < end + GAP:
            return f"address {address:#x}"
        return f"{name}[{(offset - begin) // tensor.itemsize}] of {(end - begin) // tensor.itemsize}"

    def _place(self) -> None:
        """Copy the arguments, with gaps around; those that share memory keep sharing it."""
        self._spans: dict[str, tuple[int, int]] = {}  # name -> first and last + 1 of its bytes, among the copies
        shift, last, position = 0, 0, 0
        for name, tensor in sorted(self._tensors.items(), key=lambda item: item[1].data_ptr()):
            begin, size = tensor.data_ptr(), _bytes_of(tensor).size
            if begin >= last:
                shift = -(-position // GAP) * GAP + GAP - begin
            self._spans[name] = begin + shift, begin + shift + size
            last, position = max(last, begin + size), max(position, begin + shift + size)
        self._bytes = np.empty(position + GAP, np.uint8)
        self._base = self._bytes.ctypes.data
        self._inside = np.zeros(self._bytes.size // self.unit, bool)
        for name, (begin, end) in self._spans.items():
            self._bytes[begin:end] = _bytes_of(self._tensors[name])
            self._inside[begin // self.unit : end // self.unit] = True

    def _granules(self, program: int, addresses: np.ndarray, size: int, kind: int) -> np.ndarray:
        """Return which granules `size` bytes at each address take up, having checked that arguments own them."""
        offsets = addresses.astype(np.int64).ravel() - self._base
        granules = offsets // self.unit
        if size > self.unit:
            granules = (granules[:, None] + np.arange(size // self.unit)).ravel()
        within = (granules >= 0) & (granules < len(self._inside))
        within[within] = self._inside[granules[within]]
        if not within.all():
            offset = int(granules[~within][0]) * self.unit
            raise BoundsError(
                f"{NAMES[kind]} of {self.describe(self._base + offset)} by program {self.programs[program]}"
            )
        return granules


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """Return what a tensor spans of its storage, as bytes that share its memory."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = int(last + 1) * tensor.itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
