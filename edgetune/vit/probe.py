"""What autograd keeps of a model's own parts, found by running one of them on almost nothing.

Arithmetic knows timm's plain block. Other norms, activations, gates and stems keep other things, and each that a count
gets wrong is a cap that does not hold; so a block is asked.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

PROBED_TOKENS = 8


def block_saved_floats(block: nn.Module, width: int) -> tuple[int, int]:
    """Floats a token that autograd keeps of a block on the gradient's path: (frozen, trained).

    The block's values and flags stay what they are; one without memory (on the meta device) is tried on a copy with
    memory that nothing was written to.
    """
    if any(parameter.is_meta for parameter in block.parameters()):
        block = copy.deepcopy(block).to_empty(device="cpu")
    training = [(module, module.training) for module in block.modules()]
    gradient = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    try:
        frozen, trained = (_saved_a_token(block, width, trains) for trains in (False, True))
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradient:
            parameter.requires_grad_(flag)
    return frozen, trained


def _saved_a_token(block: nn.Module, width: int, trains: bool) -> int:
    block.train(trains).requires_grad_(trains)
    device = next(block.parameters()).device
    # On the CPU, since another device saves other things; fork_rng, since dropout draws.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        tokens = torch.zeros(1, PROBED_TOKENS, width, device=device, requires_grad=True)
        return -(-_saved_floats(block, tokens) // PROBED_TOKENS)


def _saved_floats(module: nn.Module, inputs: Tensor) -> int:
    """Floats in the storages that autograd keeps of one forward pass, but for the module's own parameters."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = module(inputs)
    del output
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own) // 4


def stem_floats(patch_embed: nn.Module, image_px: tuple[int, int]) -> tuple[int, int]:
    """Floats an image of a convolutional stem: (kept by autograd where it trains, its largest feature map)."""
    largest = 0

    def see(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    stem = copy.deepcopy(patch_embed).to("meta").eval().requires_grad_(True)
    images = torch.empty(2, 3, *image_px, device="meta")
    # What does not grow with the batch (standardised kernels) is no image's.
    kept = _saved_floats(stem, images) - _saved_floats(stem, images[:1].clone())
    for module in stem.modules():
        module.register_forward_hook(see)
    with torch.no_grad():
        stem(images[:1])
    return kept, largest
