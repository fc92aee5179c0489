"""Recompute: what autograd would keep of a part of the model is dropped and made again when the backward needs it.

As `torch.utils.checkpoint` (non-reentrant) does it, and equal to it to the last bit, but without it: its first call
imports torch._dynamo, 79 MiB. While the part runs, each tensor that autograd wants to keep is replaced by its number.
The first number that the backward asks for runs the part again from its kept input, now holding what was asked to be
kept, and stops as soon as it has all of it: what comes after the last kept tensor is not computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from edgetune.cost import Recompute
from edgetune.vit.stock import kinds

Run = Callable[[Tensor], Tensor]


class _Enough(Exception):
    """All that the backward needs has been made again."""


class _Part:
    """A part of a forward pass that autograd keeps the input of, and nothing else."""

    def __init__(self, run: Run, inputs: Tensor, random: bool) -> None:
        self._run = run
        self._inputs = inputs.detach()
        self._gradient = inputs.requires_grad
        # Dropout and drop path must draw again what they drew.
        self._random_state = torch.get_rng_state() if random else None
        self._kept = 0
        self._again: list[Tensor | None] = []

    def pack(self, _tensor: Tensor) -> int:
        self._kept += 1
        return self._kept - 1

    def unpack(self, number: int) -> Tensor:
        if not self._again:
            self._recompute()
        tensor, self._again[number] = self._again[number], None
        if tensor is None:
            raise RuntimeError("a recomputed tensor was asked for twice: the graph can be walked back once only")
        return tensor

    def _recompute(self) -> None:
        again: list[Tensor | None] = []

        def pack(tensor: Tensor) -> int:
            again.append(tensor.detach())
            if len(again) == self._kept:
                raise _Enough
            return len(again) - 1

        def unpack(_number: int) -> Tensor:
            raise RuntimeError("the graph of a recomputation has no backward of its own")

        inputs = self._inputs.requires_grad_(self._gradient)
        before = torch.get_rng_state() if self._random_state is not None else None
        try:
            if self._random_state is not None:
                torch.set_rng_state(self._random_state)
            with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
                self._run(inputs)
        except _Enough:
            pass
        finally:
            if before is not None:
                torch.set_rng_state(before)
        if len(again) != self._kept:
            raise RuntimeError(f"the part kept {self._kept} tensors, and {len(again)} when it was computed again")
        self._again = again


def recomputed(run: Run, inputs: Tensor, *, random: bool) -> Tensor:
    """`run(inputs)`, of which autograd keeps the inputs alone. `random`: it may draw from torch's generator."""
    part = _Part(run, inputs, random)
    with saved_tensors_hooks(part.pack, part.unpack):
        return run(inputs)


def run_recomputed(block: nn.Module, tokens: Tensor, level: Recompute) -> Tensor:
    """One unmodified block (B, T, D) -> (B, T, D), with so much of it recomputed."""
    if level is Recompute.BLOCK:
        return recomputed(block, tokens, random=block.training)
    with _mlp_half_recomputed(block) if level is Recompute.MLP else nullcontext():
        result: Tensor = block(tokens)
    return result


def has_mlp_half(block: nn.Module) -> bool:
    """Whether the second half of the block is `norm2`, then `mlp`: what `Recompute.MLP` recomputes together."""
    return any(type(block).forward is kind.forward for kind in kinds("Block"))


@contextmanager
def _mlp_half_recomputed(block: Any) -> Iterator[None]:
    """While this is entered, the block's `norm2` hands its input on and its `mlp` computes both, recomputed.

    Instance attributes that are taken away again; the modules themselves, their parameters and names stay.
    """
    norm, mlp = block.norm2, block.mlp
    mlp_forward = mlp.forward
    with ExitStack() as until_mlp:
        until_mlp.enter_context(_forward_is(norm, lambda tokens: tokens))

        def half(tokens: Tensor) -> Tensor:
            until_mlp.close()  # norm2 is itself again, with whatever hooks it has
            return recomputed(lambda inputs: mlp_forward(norm(inputs)), tokens, random=block.training)

        with _forward_is(mlp, half):
            yield


@contextmanager
def _forward_is(module: nn.Module, forward: Run) -> Iterator[None]:
    """While this is entered, the module runs `forward`; what was there before comes back."""
    own = module.__dict__
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
