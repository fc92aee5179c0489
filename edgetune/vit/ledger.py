"""A ledger of the tensors that a part of a model takes and gives back in a run on torch's meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.cost.probed import Bytes, added
from edgetune.vit.dimensions import Dimensions
from edgetune.vit.kernels import ANSWERS, SCRATCH, aten, tensors_of


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is entered, what is live and what the peaks were."""

    def __init__(self, dimensions: Dimensions, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dimensions = dimensions
        self._held: dict[int, tuple[Any, Bytes]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = Bytes()
        self.tops: list[Bytes] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch wraps the method below in something whose first call imports torch._dynamo (79 MiB).
        return False

    def begin(self) -> None:
        """Count peaks, and what is live, from here."""
        self.live = Bytes()
        self.tops = [self.live]

    def know(self, tensor: Tensor) -> None:
        """It was there before: not counted."""
        key = tensor.untyped_storage()._cdata
        self._known.add(key)
        _, size = self._held.pop(key, (None, Bytes()))
        self.live = added(self.live, size, -1)

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._held:
            return
        size = self._dimensions.bytes_of(storage.nbytes())

        def gone(_reference: Any) -> None:
            if self._held.pop(key, None) is not None:
                self.live = added(self.live, size, -1)

        self._held[key] = weakref.ref(storage, gone), size
        self.live = added(self.live, size)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten.add and _is_engines_sum(args):
            # Where modes are watching, autograd adds up gradients out of place; in a run it does so in place.
            return args[0]
        answer = ANSWERS.get(packet)
        result = answer(*args, **kwargs) if answer is not None else func(*args, **kwargs)
        before = self.live
        for tensor in tensors_of(result):
            self.take(tensor)
        rule = SCRATCH.get(packet)
        if rule is not None:
            for scratch in rule(self._dimensions, args, result):
                self.tops.append(added(self.live, scratch))
        elif self.live is not before:
            self.tops.append(self.live)
        return result


def _is_engines_sum(args: Any) -> bool:
    """Whether autograd itself adds up what two nodes gave for one tensor, one of which nobody else holds."""
    if torch.is_grad_enabled() or torch._C._current_autograd_node() is None or len(args) != 2:
        return False
    if not all(isinstance(each, Tensor) for each in args) or args[0].shape != args[1].shape:
        return False
    return any(_held_alone(each) for each in args)


def _held_alone(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # One for the tensor, one for `storage` here.
    return (
        torch._C._storage_Use_Count(storage._cdata) <= 2 and storage.nbytes() == tensor.numel() * tensor.element_size()
    )
