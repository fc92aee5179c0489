"""The model cut at a block, as ONNX graphs: the frozen prefix for inference, the suffix with its loss for training.

How many patch tokens each block sees is an input of the graph, so that every step of a device may prune as it likes. The
computation is that of `vit.loop` (tests compare them); it is written down again here because a count that is a tensor
can't decide whether anything is dropped.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from edgetune.errors import UnsupportedModel
from edgetune.vit.loop import class_attention, embed
from edgetune.vit.plain import AnyViT

# LayerNormalization is an operator of its own from opset 17 on, whose gradient ONNX Runtime 1.19.2 can't build.
OPSET = 16
IR_VERSION = 8
_LOGGERS = ("torch.onnx",)


class Cut(nn.Module):
    """Blocks `first` to `end` of a model as one forward, with what stands before (0) or behind (all) them.

    forward(inputs, tokens) or, with `trains`, forward(inputs, tokens, targets). inputs (B, 3, H, W) where `first` is 0,
    else (B, P + N, D); tokens (depth,) int64: patch tokens that enter each block (the counts of the cut's own blocks are
    read, and of the block behind it); targets (B, classes).

    Returns, in this order: the loss, the logits (B, classes), what the classifier is given (B, D), the class-token deltas
    (end - first,); of a prefix, its
    tokens (B, P + k, D) and the deltas.
    """

    def __init__(self, model: AnyViT, first: int, end: int, *, prunes: bool) -> None:
        super().__init__()
        self.first, self.end, self.prunes = first, end, prunes
        self.depth = len(model.blocks)
        self.prefix_tokens = model.num_prefix_tokens
        self.model = model

    def run(self, inputs: Tensor, tokens: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        model: Any = self.model
        stream = embed(model, inputs) if self.first == 0 else inputs
        deltas = []
        for index in range(self.first, self.end):
            before = stream[:, 0]
            block = model.blocks[index]
            last = index + 1 == self.depth
            stream = block(stream) if last or tokens is None else self._pruned(block, stream, tokens[index + 1])
            if self.prunes:
                deltas.append((stream[:, 0] - before).detach().square().sum(dim=1).mean())
        return stream, deltas

    def _pruned(self, block: Any, stream: Tensor, leaving: Tensor) -> Tensor:
        rows: list[Tensor] = []
        handle = block.attn.qkv.register_forward_hook(
            lambda _module, _inputs, qkv: rows.append(class_attention(block.attn, qkv.detach()))
        )
        try:
            stream = block(stream)
        finally:
            handle.remove()
        scores = rows[0][:, self.prefix_tokens :]
        kept: Any = leaving  # traced: a count that stays an input
        chosen = scores.topk(kept, dim=1).indices.sort(dim=1).values + self.prefix_tokens
        always = torch.arange(self.prefix_tokens).expand(stream.shape[0], -1)
        index = torch.cat((always, chosen), dim=1)[:, :, None].expand(-1, -1, stream.shape[2])
        return stream.gather(1, index)


class Prefix(Cut):
    """Blocks below the cut, for inference."""

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        stream, deltas = self.run(images, tokens)
        return (stream, torch.stack(deltas)) if deltas else (stream,)


class Suffix(Cut):
    """Blocks above the cut, the classifier and the loss."""

    def forward(self, inputs: Tensor, targets: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        model: Any = self.model
        stream, deltas = self.run(inputs, tokens)
        normed = model.norm(stream)
        logits, given = model.forward_head(normed), model.forward_head(normed, pre_logits=True)
        loss = -(targets * torch.nn.functional.log_softmax(logits, dim=-1)).sum()
        if not self.prunes:
            return loss, logits, given
        return loss, logits, given, torch.stack(deltas)


def prefix_graph(model: AnyViT, blocks: int, *, prunes: bool) -> onnx.ModelProto:
    """The lowest `blocks` blocks. Its weights are named as timm names them.

    Raises: UnsupportedModel naming the operator that can't be exported.
    """
    cut = Prefix(model, 0, blocks, prunes=prunes)
    outputs = ["features", "deltas"] if prunes else ["features"]
    return _exported(cut, (_images(model),), ["images"], outputs)


def suffix_graph(model: AnyViT, first: int, *, prunes: bool) -> onnx.ModelProto:
    """The blocks from `first` up with classifier and loss, ready for the gradient builder. Raises: as `prefix_graph`."""
    cut = Suffix(model, first, len(model.blocks), prunes=prunes and first < len(model.blocks))
    inputs = _images(model)
    if first:
        with torch.no_grad():
            inputs = embed(model, inputs)
    targets = torch.full((2, model.num_classes), 0.5 / model.num_classes)
    outputs = ["loss", "logits", "head_inputs", *(["deltas"] if cut.prunes else [])]
    return _exported(cut, (inputs, targets), ["images" if first == 0 else "features", "targets"], outputs)


def _images(model: AnyViT) -> Tensor:
    height, width = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    return torch.rand(2, 3, int(height), int(width))


def _exported(cut: Cut, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str]) -> onnx.ModelProto:
    if cut.prunes:
        patches = cut.model.patch_embed.num_patches
        inputs, names = (*inputs, torch.full((cut.depth,), patches, dtype=torch.int64)), [*names, "tokens"]
    dynamic = {name: {0: "batch"} for name in (*names, *outputs) if name not in ("tokens", "loss", "deltas")}
    if "features" in dynamic:
        dynamic["features"] = {0: "batch", 1: "stream"}
    buffer = io.BytesIO()
    torch.onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm, OPSET)  # type: ignore[attr-defined]
    with _exportable(cut.model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                cut,
                inputs,
                buffer,  # type: ignore[arg-type]
                input_names=names,
                output_names=outputs,
                dynamic_axes=dynamic,
                opset_version=OPSET,
                do_constant_folding=False,
                # Or equal weights would become one, which training makes different.
                training=torch.onnx.TrainingMode.TRAINING,
                dynamo=False,
            )
        except Exception as error:
            raise UnsupportedModel(
                f"{type(cut.model).__name__} can't be exported for ONNX Runtime training: {_reason(error)}. "
                "Train it with torch (--backend torch), or try a plain vit_* or deit_* model."
            ) from error
    graph = onnx.load_from_string(buffer.getvalue())
    _rename(graph)
    graph.ir_version = IR_VERSION
    return graph


def _rms_norm(graph: Any, inputs: Any, shape: Any, weight: Any, epsilon: Any) -> Any:
    """torch's RMS norm over the last dimension, of plain operators: the exporter has none for it."""
    from torch.onnx.symbolic_helper import _get_const, _is_none

    value = _get_const(epsilon, "f", "eps")  # type: ignore[no-untyped-call]
    small = graph.op("Constant", value_t=torch.tensor(torch.finfo(torch.float32).eps if value is None else value))
    mean = graph.op("ReduceMean", graph.op("Mul", inputs, inputs), axes_i=[-1], keepdims_i=1)
    normed = graph.op("Div", inputs, graph.op("Sqrt", graph.op("Add", mean, small)))
    return normed if _is_none(weight) else graph.op("Mul", normed, weight)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


@contextmanager
def _exportable(model: AnyViT) -> Iterator[None]:
    """While this is entered, attention is made of plain operators, and nothing is dropped at random."""
    changed = []
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
            changed.append((module, "fused_attn", True))
        train = module.train
        module.train = MethodType(lambda self, mode=True: self, module)
        changed.append((module, "train", train))
    model.eval = lambda: model
    for module in model.modules():
        module.training = False
    try:
        yield
    finally:
        for module, name, value in changed:
            if name == "train":
                module.__dict__.pop("train", None)
            else:
                setattr(module, name, value)
        model.__dict__.pop("eval", None)


def _rename(graph: onnx.ModelProto) -> None:
    """Weights by timm's names: the exporter puts the attribute that holds the model in front."""
    prefix = "model."

    def plain(name: str) -> str:
        return name.removeprefix(prefix)

    for tensor in graph.graph.initializer:
        tensor.name = plain(tensor.name)
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        value.name = plain(value.name)
    for node in graph.graph.node:
        node.input[:] = [plain(name) for name in node.input]
        node.output[:] = [plain(name) for name in node.output]
