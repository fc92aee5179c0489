"""Parts of a model that are not timm's plain ones, run once on torch's meta device to see what they hold.

Arithmetic (`cost/`) knows the plain block, the plain patch embedding and the plain head. Other norms, activations, gates,
stems and poolings hold other things, and each that a count gets wrong is a cap that does not hold; so such a part is run,
in every way that a step may run it, by the code that runs it in a step. No memory is taken and nothing of the model
changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgetune.cost import BlockState, Recompute
from edgetune.cost.probed import HELD, Bytes, ProbedPart, ProbedWalk, added, block_way, largest, part_way
from edgetune.cost.tape import FLOAT_BYTES, RANDOM_STATE_BYTES
from edgetune.vit.dimensions import CLASSES, IMAGES, LEAVING, TOKENS, Dimensions
from edgetune.vit.half import store_half
from edgetune.vit.kernels import fused_attention
from edgetune.vit.ledger import Ledger

RunBlock = Callable[[nn.Module, Tensor, int, int, Recompute], Tensor]
_GRADIENTS = range(3)  # they stay, are added to others, are used up


class Stream(NamedTuple):
    """The residual stream (B, T, D)."""

    width: int
    prefix_tokens: int
    transposed: bool = False  # as a convolution leaves it where no prefix token is put before it: D outside of T


def probe_block(block: nn.Module, run: RunBlock, stream: Stream, *, prunes: bool, has_half: bool) -> ProbedPart:
    """A block in every way that a step may run it. `run`: as `loop.run_block`; `prunes`: tokens may be dropped after it.

    `has_half`: its MLP half can be recomputed by itself.
    """
    ways = _block_ways(block, run, stream, IMAGES, prunes=prunes, has_half=has_half)
    alone: tuple[tuple[int, ProbedWalk], ...] = ()
    if any(each.pair for _, walk in ways for each in walk.forward):
        # Whole attention matrices are made by products that lay several images out anew, and one not.
        alone = _block_ways(block, run, stream, 1, prunes=prunes, has_half=has_half)
    return ProbedPart(ways, _shapes(block), alone)


def _block_ways(
    block: nn.Module, run: RunBlock, stream: Stream, images: int, *, prunes: bool, has_half: bool
) -> tuple[tuple[int, ProbedWalk], ...]:
    levels = [level for level in Recompute if has_half or level is not Recompute.MLP]
    prefix, dimensions = stream.prefix_tokens, Dimensions(stream.prefix_tokens, images)
    came, random = Bytes(token=stream.width * FLOAT_BYTES), Bytes(once=RANDOM_STATE_BYTES)
    whole, halved = _on_meta(block), _on_meta(block)
    store_half(SimpleNamespace(blocks=[halved]), 1)
    weights = Bytes(once=sum(parameter.numel() for parameter in block.parameters()) * FLOAT_BYTES)
    ways: dict[int, ProbedWalk] = {}

    def found(
        state: BlockState,
        level: Recompute,
        pruned: bool,
        lowest: bool = False,
        gradients: int = 0,
        half: bool = False,
        held: bool = False,
    ) -> ProbedWalk:
        own, leaving = halved if half else whole, (LEAVING if pruned else TOKENS) - prefix
        trained = state is BlockState.TRAINED
        _set(own, trained)
        walk = _probe(
            lambda tokens: run(own, tokens, leaving, prefix, level),
            own,
            _tokens_of(stream, images),
            dimensions,
            keeps=state is not BlockState.BELOW,
            inner=state is not BlockState.BELOW and not lowest,
            gradients=gradients,
            input_is_ours=not held,
        )
        # What is live at the end is the output and what lies in between; at the start the input was live.
        out = Bytes(leaving=stream.width * FLOAT_BYTES) if pruned else came
        kept = added(added(walk.kept, came), out, -1)
        beside = random if trained and level is not Recompute.NOTHING else Bytes()
        return ProbedWalk(
            tuple(added(each, beside) for each in walk.forward),
            added(kept, beside),
            tuple(added(each, beside) for each in walk.backward),
            weights if trained and not gradients else Bytes(),
        )

    lowest_one = BlockState.TRAINED, Recompute.NOTHING, False, True
    # A norm that keeps its input keeps it whoever holds it as well.
    is_kept = found(*lowest_one) == found(*lowest_one, held=True)
    for pruned in (False, True) if prunes else (False,):
        for half in (False, True):
            way = block_way(BlockState.BELOW, Recompute.NOTHING, pruned=pruned, lowest=False, gradients=0, half=half)
            ways[way] = found(BlockState.BELOW, Recompute.NOTHING, pruned, half=half)
        for level in levels:
            way = block_way(BlockState.ON_PATH, level, pruned=pruned, lowest=False, gradients=0, half=False)
            ways[way] = found(BlockState.ON_PATH, level, pruned)
            for gradients, lowest in product(_GRADIENTS, (False, True)):
                asked = BlockState.TRAINED, level, pruned, lowest, gradients
                way = block_way(
                    BlockState.TRAINED, level, pruned=pruned, lowest=lowest, gradients=gradients, half=False
                )
                ways[way] = found(*asked)
                if lowest and not is_kept:
                    ways[way + HELD] = found(*asked, held=True)
    return tuple(sorted(ways.items()))


def probe_embed(model: nn.Module, run: Callable[[Any, Tensor], Tensor], image_px: tuple[int, int]) -> ProbedPart:
    """Images to tokens, frozen and trained. `run`: as `loop.embed`."""
    own = _on_meta(model, without=("blocks", "norm", "attn_pool", "fc_norm", "head", "head_dist"))
    ways = {}
    for keeps, gradients in ((False, 0), *((True, each) for each in _GRADIENTS)):
        _set(own, keeps)
        ways[part_way(keeps=keeps, gradients=gradients)] = _probe(
            lambda images: run(own, images),
            own,
            lambda: torch.empty((IMAGES, 3, *image_px), device="meta"),
            Dimensions(0),
            keeps=keeps,
            inner=False,
            gradients=gradients,
            input_is_ours=False,
        )
    return ProbedPart(tuple(ways.items()), _shapes(own), buffer_bytes=_buffer_bytes(own))


def is_transposed(model: nn.Module, run: Callable[[Any, Tensor], Tensor], image_px: tuple[int, int]) -> bool:
    """How the embeddings leave the residual stream. `run`: as `loop.embed`."""
    own = _on_meta(model, without=("blocks", "norm", "attn_pool", "fc_norm", "head", "head_dist")).eval()
    with torch.no_grad():
        return not run(own, torch.empty((2, 3, *image_px), device="meta")).is_contiguous()


def probe_head(model: Any, stream: Stream) -> ProbedPart:
    """Final norm, pooling, classifier and loss: trained, and in evaluation."""
    own = _on_meta(model, without=("blocks", "patch_embed", "norm_pre"))
    for name, module in own.named_children():
        if isinstance(module, nn.Linear) and module.out_features == model.num_classes:
            setattr(own, name, nn.Linear(module.in_features, CLASSES, module.bias is not None, device="meta"))
    for name in list(own._parameters):
        own._parameters[name] = None  # position embedding and tokens
    target = torch.empty(IMAGES, dtype=torch.int64, device="meta")

    def logits(tokens: Tensor) -> Tensor:
        result: Tensor = own.forward_head(own.norm(tokens))
        return result

    def loss(tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(tokens), target, reduction="sum")

    ways = {}
    for keeps, inner, gradients, held in (
        (False, False, 0, False),
        *((True, inner, each, False) for inner in (False, True) for each in _GRADIENTS),
        *((True, False, each, True) for each in _GRADIENTS),
    ):
        _set(own, keeps)
        ways[part_way(keeps=keeps, inner=inner, gradients=gradients) + HELD * held] = _probe(
            loss if keeps else logits,
            own,
            _tokens_of(stream, IMAGES),
            Dimensions(stream.prefix_tokens),
            keeps=keeps,
            inner=inner,
            gradients=gradients,
            input_is_ours=not held,
        )
    ways = {way: walk for way, walk in ways.items() if way < HELD or walk != ways[way - HELD]}
    others = tuple(shape for shape in _shapes(own) if CLASSES not in shape)
    return ProbedPart(tuple(ways.items()), others, buffer_bytes=_buffer_bytes(own))


def _tokens_of(stream: Stream, images: int) -> Callable[[], Tensor]:
    if stream.transposed:
        return lambda: torch.empty((images, stream.width, TOKENS), device="meta").transpose(1, 2)
    return lambda: torch.empty((images, TOKENS, stream.width), device="meta")


def _shapes(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(parameter.shape) for parameter in module.parameters())


def _buffer_bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


def _set(module: nn.Module, trained: bool) -> None:
    """As `loop.apply_selection` does it."""
    module.train(trained).requires_grad_(trained)
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.eval()


def _on_meta(module: nn.Module, without: tuple[str, ...] = ()) -> Any:
    """A copy without memory: float32 whatever it is stored as; the children `without` are left out."""
    memo: dict[int, Any] = {}
    for name in without:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            memo[id(child)] = nn.Identity()
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, device="meta"))
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


class _Above(torch.autograd.Function):
    """What comes after a part: its backward makes the gradient of the part's output, and then the part's own begins."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, ledger: Ledger) -> Tensor:
        ctx.shape, ctx.ledger = output.shape, ledger
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, None]:
        made = torch.empty(ctx.shape, device="meta")
        ctx.ledger.begin()
        return made, None


class _Below(torch.autograd.Function):
    """What comes before a part: its backward sees the gradient of the part's input."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, make: Callable[[], Tensor], ended: list[Bytes], ledger: Ledger) -> Tensor:
        ctx.ended, ctx.ledger = ended, ledger
        return make()

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.ended.append(ctx.ledger.live)
        return None, None, None, None


def _probe(
    run: Callable[[Tensor], Tensor],
    module: nn.Module,
    make: Callable[[], Tensor],
    dimensions: Dimensions,
    *,
    keeps: bool,
    inner: bool,
    gradients: int,
    input_is_ours: bool = True,
) -> ProbedWalk:
    """One run of a part, forward and, where it keeps anything, backward.

    `make` makes its input. A part whose output is a scalar is taken to end in the loss. `input_is_ours`: the input is the
    part's to give back.
    """
    parameters = list(module.parameters())
    ledger = Ledger(dimensions, [*parameters, *module.buffers()])
    for parameter in parameters:
        parameter.grad = None
        if keeps and gradients == 1 and parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            ledger.know(parameter.grad)
    with torch.random.fork_rng(devices=[]), _used_up(parameters if gradients == 2 else []), ledger, fused_attention():
        ended: list[Bytes] = []
        if inner:
            tokens = _Below.apply(torch.empty((), device="meta", requires_grad=True), make, ended, ledger)
        else:
            tokens = make()
            if not input_is_ours:
                ledger.know(tokens)
        ledger.begin()
        with torch.set_grad_enabled(keeps):
            tokens = run(tokens)
        kept, forward = ledger.live, largest(ledger.tops)
        if not keeps:
            return ProbedWalk(forward, kept)
        if tokens.dim():
            tokens = _Above.apply(tokens, ledger)
        ledger.begin()
        tokens.backward()
        end = ended[0] if ended else ledger.live
    return ProbedWalk(forward, kept, largest(ledger.tops), added(kept, end))


@contextmanager
def _used_up(parameters: list[nn.Parameter]) -> Iterator[None]:
    """While this is entered, a gradient goes as soon as it is there."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
        for parameter in parameters
        if parameter.requires_grad
    ]
    yield
    for handle in handles:
        handle.remove()
