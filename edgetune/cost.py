"""Bytes and FLOPs of one training step, from arithmetic alone: no torch, no numpy, no model.

What comes in: a `ViTShape` (what the model is), a `Selection` (what this step does), a micro-batch.
What goes out: a `StepCost`, found by walking the step the way autograd does: forward, block by block, adding what each
op saves; backward, from the head down, with what is still held, the gradients made so far and the block's own workspace.

Widths below count floats a token: D is the model's width, M the MLP's hidden width, A = heads x head width.
Source: counted op by op in timm 1.0's `Block`, `Attention` and `Mlp` under fused CPU attention; the tests hold the
result against the CPU allocator's own events.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

FLOAT_BYTES = 4
INDEX_BYTES = 8
# oneDNN's scratch for the patch embedding's weight gradient, in copies of the kernel (measured: 73 MiB for 9 MiB).
CONVOLUTION_SCRATCH_COPIES = 8
# Copies of each trained parameter that an optimizer keeps for good.
OPTIMIZER_STATE_COPIES = {"adamw": 2, "momentum": 1, "sgd": 0}


class ViTShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost of a Vision Transformer depends on. Counts are of one model, widths are floats a token."""

    name: str
    depth: int
    width: int
    heads: int
    head_width: int
    mlp_width: int
    patch_tokens: int
    prefix_tokens: int
    classes: int
    image_px: tuple[int, int]
    patch_px: tuple[int, int]
    channels: int = 3
    class_token: bool = True
    token_pool: bool = True  # the head reads the class token
    fused_qkv: bool = True  # attention has one `qkv` projection, from which the class token's row can be had
    layer_scale: bool = False
    qk_norm: bool = False
    pre_norm: bool = False
    gated_mlp: bool = False
    # Hidden layers that stand at once in the MLP's forward: before and after the activation, and what it makes between.
    hidden_layers: int = 2
    # Floats a token that autograd keeps of a block (frozen, trained), as the block itself tells; None: counted below.
    block_saved_floats: tuple[int, int] | None = None
    # A convolutional stem's, floats an image: what autograd keeps of it where it trains, and its largest feature map.
    stem_saved_floats: int = 0
    stem_largest_floats: int = 0
    embed_parameters: int
    block_parameters: int
    head_parameters: int  # final norm, pooling and classifier
    largest_parameter: int  # elements of the largest single tensor

    @property
    def parameters(self) -> int:
        return self.embed_parameters + self.depth * self.block_parameters + self.head_parameters

    @property
    def all_tokens(self) -> int:
        return self.patch_tokens + self.prefix_tokens

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_width


class Selection(msgspec.Struct, frozen=True):
    """What one step does: which blocks train, and how many patch tokens each block sees. The head always trains."""

    trains: tuple[bool, ...]
    tokens: tuple[int, ...]
    embeddings_train: bool = False

    @property
    def depth(self) -> int:
        return len(self.trains)

    @property
    def lowest_trained_block(self) -> int:
        """The first block that carries gradient; `depth` when only the head trains, 0 when the embeddings do."""
        if self.embeddings_train:
            return 0
        return next((block for block, trained in enumerate(self.trains) if trained), self.depth)


def all_tokens_kept(shape: ViTShape, trains: tuple[bool, ...], embeddings_train: bool = False) -> Selection:
    """The selection that prunes nothing."""
    return Selection(trains, (shape.patch_tokens,) * shape.depth, embeddings_train)


class BlockState(IntEnum):
    """What autograd keeps of a block in one step."""

    BELOW = 0  # nothing below it trains: it keeps nothing
    ON_PATH = 1  # frozen, but gradient passes through it
    TRAINED = 2


def block_states(selection: Selection) -> tuple[BlockState, ...]:
    lowest = selection.lowest_trained_block
    return tuple(
        BlockState.TRAINED if trained else BlockState.ON_PATH if block >= lowest else BlockState.BELOW
        for block, trained in enumerate(selection.trains)
    )


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one optimizer step, by what holds them, and its FLOPs.

    `peak_bytes` is the peak of live tensor bytes; the parts are what each kind holds at its own largest, so they may
    add up to more than the peak.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int
    inputs_bytes: int
    peak_bytes: int
    flops: int


def saved_bytes(shape: ViTShape, state: BlockState, patch_tokens: int, batch: int) -> int:
    """Bytes autograd keeps of one block between its forward and its backward.

    A trained block keeps the inputs of its linears, its norms, its activation and its attention; a frozen one on the
    path keeps no linear's input, since nothing needs the weights' gradients.
    """
    if state is BlockState.BELOW:
        return 0
    trained = state is BlockState.TRAINED
    floats = shape.block_saved_floats[trained] if shape.block_saved_floats else _saved_floats(shape, trained)
    return floats * batch * (patch_tokens + shape.prefix_tokens) * FLOAT_BYTES


def _saved_floats(shape: ViTShape, trained: bool) -> int:
    """Floats a token that timm's plain `Block` keeps."""
    width, mlp, attention = shape.width, shape.mlp_width, shape.attention_width
    # norm1 and norm2 inputs; q, k, v; attention's output (which is proj's input).
    floats = 2 * width + 3 * attention + attention
    # mean and rstd of both norms; log-sum-exp of each head's rows.
    floats += 4 + shape.heads
    if shape.qk_norm:
        floats += 2 * attention + 4 * shape.heads
        floats += attention if trained else 0  # proj's input is then a copy of attention's output
    # The activation's input. A gated MLP keeps both halves and the activated one.
    floats += 3 * mlp if shape.gated_mlp else mlp
    if trained:
        floats += 2 * width + mlp  # inputs of qkv, fc1 and fc2
        if shape.layer_scale:
            floats += 2 * width
    return floats


def _pruning_bytes(shape: ViTShape, after: int, batch: int) -> int:
    """What dropping tokens after a block keeps: the kept tokens' indices.

    Counted whether or not a block drops any (a thousandth of what it saves), so that fewer tokens never cost more: a
    plan stands on that.
    """
    return (after + shape.prefix_tokens) * batch * INDEX_BYTES


def forward_workspace_bytes(shape: ViTShape, patch_tokens: int, batch: int) -> int:
    """The most that one block's forward holds beyond what it saves, with or without gradient.

    Inside the MLP: the block's input, the residual stream, its normed copy, the hidden layer before and after its
    activation.
    """
    mlp = shape.hidden_layers * shape.mlp_width
    floats = max(3 * shape.width + mlp, 3 * shape.width + 4 * shape.attention_width)
    return floats * batch * (patch_tokens + shape.prefix_tokens) * FLOAT_BYTES


def _backward_workspace_bytes(shape: ViTShape, state: BlockState, patch_tokens: int, batch: int) -> int:
    """The most that one block's backward makes at once, beyond what it saved.

    The stream's gradient and the hidden layer's, after and before the activation. A trained block has freed fc2's
    input by then, which makes up for one of them.
    """
    hidden = (2 if shape.gated_mlp else shape.hidden_layers - 1) * shape.mlp_width
    if state is BlockState.ON_PATH:
        hidden += shape.mlp_width
    floats = max(2 * shape.width + hidden, 2 * shape.width + 4 * shape.attention_width)
    return floats * batch * (patch_tokens + shape.prefix_tokens) * FLOAT_BYTES


def _embedding_workspace_bytes(shape: ViTShape, batch: int) -> int:
    """The most that the embedding holds at once: the tokens three times, or a stem's feature maps."""
    floats = max(shape.all_tokens * shape.width, shape.stem_largest_floats)
    return 3 * floats * batch * FLOAT_BYTES


def trained_parameters(shape: ViTShape, trained_blocks: int, embeddings_train: bool) -> int:
    """Parameters that get a gradient when `trained_blocks` blocks and the head train."""
    embed = shape.embed_parameters if embeddings_train else 0
    return shape.head_parameters + trained_blocks * shape.block_parameters + embed


def input_bytes(shape: ViTShape, batch: int) -> int:
    """One batch of images as float32."""
    return batch * shape.channels * shape.image_px[0] * shape.image_px[1] * FLOAT_BYTES


def step_cost(
    shape: ViTShape,
    selection: Selection,
    *,
    micro_batch: int,
    accumulation: int,
    optimizer: str,
    ever_trained_blocks: int,
) -> StepCost:
    """Cost of one optimizer step of `accumulation` micro-batches.

    `ever_trained_blocks` counts every block that may train in some step of the run: optimizer state only grows.

    Raises: ValueError if the selection's depth is not the shape's.
    """
    if selection.depth != shape.depth or len(selection.tokens) != shape.depth:
        raise ValueError(f"selection of depth {selection.depth} for a model of depth {shape.depth}")
    states = block_states(selection)
    weights = shape.parameters * FLOAT_BYTES
    state_copies = OPTIMIZER_STATE_COPIES[optimizer]
    optimizer_bytes = (
        state_copies * FLOAT_BYTES * trained_parameters(shape, ever_trained_blocks, selection.embeddings_train)
    )
    inputs = input_bytes(shape, micro_batch)
    trained_count = sum(selection.trains)
    all_gradients = FLOAT_BYTES * trained_parameters(shape, trained_count, selection.embeddings_train)
    # With several micro-batches the gradients of the earlier ones are there from the start.
    carried = all_gradients if accumulation > 1 else 0
    resting = weights + optimizer_bytes + inputs

    # Forward: what has been saved so far, plus the workspace of the block at hand.
    embedded = micro_batch * shape.all_tokens * shape.width * FLOAT_BYTES
    held = (input_bytes(shape, micro_batch) + embedded) if selection.embeddings_train else 0
    stem = micro_batch * shape.stem_saved_floats * FLOAT_BYTES if selection.embeddings_train else 0
    held += stem
    if shape.pre_norm and selection.embeddings_train:
        held += embedded
    peak = resting + carried + held + _embedding_workspace_bytes(shape, micro_batch)
    saved: list[int] = []
    for block, state in enumerate(states):
        tokens = selection.tokens[block]
        after = selection.tokens[block + 1] if block + 1 < shape.depth else tokens
        peak = max(peak, resting + carried + held + forward_workspace_bytes(shape, tokens, micro_batch))
        kept = saved_bytes(shape, state, tokens, micro_batch)
        if state is not BlockState.BELOW:
            kept += _pruning_bytes(shape, after, micro_batch)
        saved.append(kept)
        held += kept
    last_tokens = selection.tokens[-1] + shape.prefix_tokens
    # The final norm keeps its input and output; logits and their gradient are counted three times.
    head = micro_batch * (2 * last_tokens * shape.width + 3 * shape.classes) * FLOAT_BYTES
    stream = micro_batch * last_tokens * shape.width * FLOAT_BYTES

    # Backward: from the head down.
    gradients = carried or shape.head_parameters * FLOAT_BYTES
    peak = max(peak, resting + gradients + held + head + 2 * stream)
    workspace = 0
    for block in reversed(range(shape.depth)):
        if states[block] is BlockState.BELOW:
            break
        own = _backward_workspace_bytes(shape, states[block], selection.tokens[block], micro_batch)
        # A weight's new gradient stands beside the one it is added to.
        temporary = shape.largest_parameter * FLOAT_BYTES if accumulation > 1 else 0
        workspace = max(workspace, own + temporary)
        peak = max(peak, resting + gradients + held + own + temporary)
        if states[block] is BlockState.TRAINED and not carried:
            gradients += shape.block_parameters * FLOAT_BYTES
        held -= saved[block]
    if selection.embeddings_train:
        kernel = shape.patch_px[0] * shape.patch_px[1] * shape.channels * shape.width * FLOAT_BYTES
        workspace_of_stem = _embedding_workspace_bytes(shape, micro_batch) - embedded
        peak = max(peak, resting + all_gradients + held + workspace_of_stem + CONVOLUTION_SCRATCH_COPIES * kernel)
    # The update of the largest tensor needs two temporaries of its size.
    update = 2 * shape.largest_parameter * FLOAT_BYTES
    peak = max(peak, resting - inputs + all_gradients + update)
    return StepCost(
        weights_bytes=weights,
        gradients_bytes=all_gradients,
        optimizer_bytes=optimizer_bytes,
        activations_bytes=sum(saved) + head,
        workspace_bytes=max(workspace, update),
        inputs_bytes=inputs,
        peak_bytes=peak,
        flops=accumulation * step_flops(shape, selection, micro_batch),
    )


def evaluation_peak_bytes(shape: ViTShape, batch: int) -> int:
    """Live bytes of a forward pass on all tokens without gradient, above weights and optimizer state."""
    return (
        input_bytes(shape, batch)
        + max(
            forward_workspace_bytes(shape, shape.patch_tokens, batch),
            _embedding_workspace_bytes(shape, batch),
        )
        + batch * shape.classes * FLOAT_BYTES
    )


def block_forward_flops(shape: ViTShape, patch_tokens: int) -> tuple[int, int]:
    """FLOPs of one block for one image: (its linears, its attention products). A multiply-add is two FLOPs."""
    tokens = patch_tokens + shape.prefix_tokens
    attention = shape.attention_width
    hidden = shape.mlp_width
    linears = 2 * tokens * shape.width * (4 * attention + (3 if shape.gated_mlp else 2) * hidden)
    return linears, 4 * tokens * tokens * attention


def step_flops(shape: ViTShape, selection: Selection, batch: int) -> int:
    """FLOPs of forward and backward over one batch, without the optimizer's (which are a thousandth).

    Backward costs a linear one product for its input's gradient and one for its weight's, attention twice its forward.
    """
    patch = shape.patch_px[0] * shape.patch_px[1] * shape.channels
    embed = 2 * shape.patch_tokens * patch * shape.width
    total = embed * (2 if selection.embeddings_train else 1)
    for block, state in enumerate(block_states(selection)):
        linears, attention = block_forward_flops(shape, selection.tokens[block])
        total += linears + attention
        if state is not BlockState.BELOW:
            total += linears + 2 * attention
        if state is BlockState.TRAINED:
            total += linears
    head = 2 * shape.width * shape.classes
    return batch * (total + 3 * head)


def full_fine_tuning_flops(shape: ViTShape, images: int) -> int:
    """What full fine-tuning on all tokens would need for as many images: the yardstick of the report."""
    everything = all_tokens_kept(shape, (True,) * shape.depth, embeddings_train=True)
    return step_flops(shape, everything, images)


def token_share(shape: ViTShape, selection: Selection) -> float:
    """Patch tokens that the blocks see, as a share of all."""
    return sum(selection.tokens) / (shape.depth * shape.patch_tokens)
