"""The bytes of CPU tensors that live at a time, counted at each operation of torch in this thread."""

# SPDX-License-Identifier: Apache-2.0
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """`peak`: the most bytes at a time that results of operations held, views counted once.

    A result that shares its memory with an argument, or with a mapped file, is no new memory: a tensor
    that no operation made, as one that was read from a file, is known from its first use on.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._known: dict[int, StorageWeakRef] = {}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_leaves((args, kwargs)):
            self._see(t, made=False)
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            self._see(t, made=True)
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return results

    def _see(self, t, made: bool) -> None:
        if not isinstance(t, torch.Tensor) or t.device.type != "cpu":
            return
        for found in (self._known, self._live):
            for key in [
                k for k, v in found.items() if (v[0] if found is self._live else v).expired()
            ]:
                del found[key]
        storage = t.untyped_storage()
        if storage._cdata in self._known:
            return
        reference = StorageWeakRef(storage)
        self._known[storage._cdata] = reference
        if made:
            self._live[storage._cdata] = reference, storage.nbytes()
