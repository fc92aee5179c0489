"""One folder of artifacts from one model: graphs, checkpoints, weights and the manifest, written in a process of their own.

`python -m edgetune.export.build FOLDER` reads `request.json` there; whoever starts it gives it a folder to fill.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from edgetune import system
from edgetune.alast import AlastSettings
from edgetune.artifacts.manifest import (
    MANIFEST_FILE,
    Adaptive,
    FileEntry,
    Input,
    Manifest,
    ParameterEntry,
    Schedule,
    Variant,
    ladder,
    variant_name,
)
from edgetune.artifacts.reading import file_sha256, files_in, read_manifest
from edgetune.checkpoint import save_tensors, write_atomically
from edgetune.checkpoint.tensors import read_layout
from edgetune.cost import Selection, StepSetup, ViTShape, step_peak_bytes
from edgetune.errors import EdgetuneError, UnsupportedModel, UsageError
from edgetune.methods import DRAWN_SHARE, adaptive_obstacle
from edgetune.optim import OptimizerSettings
from edgetune.planner import TOKEN_MULTIPLE, default_token_floor
from edgetune.regions import region_of, trains

REQUEST_FILE, ERROR_FILE, PARITY_FILE, WEIGHTS_FILE = "request.json", "error.txt", "parity.json", "model.safetensors"
PREDICTED_BATCH = 8
PACKAGES = ("edgetune", "torch", "timm", "onnx", "onnxruntime-training-cpu")


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be exported."""

    model: str
    weights: str | None = None
    pretrained: bool = True
    image_px: int | None = None
    class_count: int
    classes: tuple[str, ...] = ()  # none: named on the device
    splits: tuple[int, ...] | None = None  # None: the ladder
    embeddings_train: bool = False  # one variant more, of everything
    weight_decay: float = 0.05
    schedule: Schedule
    alast: AlastSettings = AlastSettings()
    seed: int = 0
    threads: int = 1
    verify: bool = True


def build(folder: Path, request: ExportRequest) -> tuple[Manifest, Any]:
    """Write everything but measurements; the manifest and the model.

    Raises: EdgetuneError of every kind that loading a model has; UnsupportedModel.
    """
    import torch

    from edgetune.vit.models import ModelSource, build_meta, load_model

    source = ModelSource(
        name=request.model, weights=request.weights, pretrained=request.pretrained, image_px=request.image_px
    )
    torch.manual_seed(request.seed)  # the new head's weights
    loaded = load_model(source, request.class_count)
    if request.model.startswith("local-dir:") and request.pretrained:
        loaded = _with_its_head(loaded, request)
    shape = build_meta(source, request.class_count)[1]
    return write_artifacts(folder, loaded, shape, request), loaded.model


def write_artifacts(folder: Path, loaded: Any, shape: ViTShape, request: ExportRequest) -> Manifest:
    """Graphs, checkpoints and weights of a `LoadedModel`; the manifest, which is not written yet."""
    from edgetune.export.graphs import IR_VERSION, OPSET
    from edgetune.export.training import write_optimizers
    from edgetune.vit.models import timm_config

    model = loaded.model.eval()
    state = {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in model.state_dict().items()
    }
    save_tensors(folder / WEIGHTS_FILE, state, {"format": "pt"})
    optimizer = OptimizerSettings(weight_decay=request.weight_decay)
    optimizers = write_optimizers(folder, optimizer, request.schedule)
    prunes = adaptive_obstacle(shape) is None
    splits = _splits(model, shape.depth, request)
    ways = [(split, False) for split in splits]
    if request.embeddings_train:
        ways.insert(0, (0, True))
    variants = tuple(_variant(folder, model, shape, split, embeddings, prunes=prunes) for split, embeddings in ways)
    return Manifest(
        opset=OPSET,
        ir_version=IR_VERSION,
        versions=system.versions(PACKAGES),
        model=request.model,
        architecture=loaded.architecture,
        model_args=loaded.model_args,
        shape=shape,
        preprocess=loaded.preprocess,
        classes=request.classes,
        config=timm_config(
            loaded, request.classes or tuple(f"class {number}" for number in range(request.class_count))
        ),
        classifier=_classifier(model),
        weights=WEIGHTS_FILE,
        variants=variants,
        optimizers=optimizers,
        weight_decay=request.weight_decay,
        schedule=request.schedule,
        adaptive=_adaptive(shape, variants, request.alast) if prunes else None,
        notes=tuple(_notes(model)),
        files={},
    )


# timm's stem of convolutions and norms before the blocks.
HYBRID_STEM = "HybridEmbed"


def _splits(model: Any, depth: int, request: ExportRequest) -> tuple[int, ...]:
    """Where the model is cut.

    Raises: UsageError for a block that the model has not; UnsupportedModel naming the module that ONNX Runtime's gradients
    leave no way for.
    """
    blocks = {type(block).__name__ for block in model.blocks}
    if "ParallelThingsBlock" in blocks:
        raise UnsupportedModel(
            f"{request.model} can't be exported: its blocks (ParallelThingsBlock) add up several attentions at once, of which "
            "ONNX Runtime 1.19.2 builds no gradient graph. Train it with torch, or try a plain vit_* or deit_* model."
        )
    splits = ladder(depth) if request.splits is None else request.splits
    beyond = [split for split in splits if not 0 <= split <= depth]
    if beyond:
        raise UsageError(
            f"--split {','.join(map(str, beyond))}: the model has {depth} blocks. Name numbers from 0 (everything trains) to {depth} (the "
            "head alone)."
        )
    stem = type(model.patch_embed).__name__
    if stem != HYBRID_STEM:
        return splits
    above = tuple(split for split in splits if split)
    if not above or request.embeddings_train or (request.splits is not None and above != splits):
        raise UnsupportedModel(
            f"{request.model} can't be exported from block 0 up: ONNX Runtime 1.19.2 builds no training graph of its stem "
            f"({stem} with {type(model.patch_embed.backbone).__name__}). Above its blocks it can: --split "
            f"{','.join(str(split) for split in ladder(depth) if split)}. Or train it with torch."
        )
    return above


def _with_its_head(loaded: Any, request: ExportRequest) -> Any:
    """A run folder's model with the classifier it learnt, where the classes are its own."""
    from edgetune.vit.models import load_saved
    from edgetune.vit.names import read_config, weights_file

    folder = Path(request.model.removeprefix("local-dir:"))
    config = read_config(folder)
    if not request.classes or list(config.get("label_names", ())) != list(request.classes):
        return loaded
    return msgspec.structs.replace(loaded, model=load_saved(folder, weights_file(folder), request.class_count))


def _variant(folder: Path, model: Any, shape: ViTShape, split: int, embeddings: bool, *, prunes: bool) -> Variant:
    import onnx

    from edgetune.export import graphs, training

    name = variant_name(split, shape.depth, embeddings_train=embeddings)
    (folder / name).mkdir()
    prefix_path: str | None = None
    prefix_inputs: tuple[Input, ...] = ()
    prefix_outputs: tuple[str, ...] = ()
    if split:
        prefix = graphs.prefix_graph(model, split, prunes=prunes)
        _share_weights(prefix, folder / WEIGHTS_FILE)
        # Beside the weights: a graph may not reach out of its own folder for them.
        prefix_path = f"prefix-{name}.onnx"
        onnx.save(prefix, str(folder / prefix_path))
        prefix_inputs, prefix_outputs = _inputs(prefix), tuple(each.name for each in prefix.graph.output)
    suffix = graphs.suffix_graph(model, split, prunes=prunes)
    inputs, outputs = _inputs(suffix), tuple(each.name for each in suffix.graph.output)
    space = Selection(
        tuple(block >= split for block in range(shape.depth)), (shape.patch_tokens,) * shape.depth, embeddings
    )
    trained = {each for each in dict(model.named_parameters()) if trains(region_of(each), space)}
    own = {tensor.name: tuple(tensor.dims) for tensor in suffix.graph.initializer}
    training.write_training(suffix, folder / name, sorted(trained & own.keys()))
    order = _graph_order(folder / name / training.TRAINING, own)
    return Variant(
        name=name,
        split_block=split,
        embeddings_train=embeddings,
        prefix_graph=prefix_path,
        prefix_inputs=prefix_inputs,
        prefix_outputs=prefix_outputs,
        training_graph=f"{name}/{training.TRAINING}",
        eval_graph=f"{name}/{training.EVAL}",
        checkpoint=f"{name}/{training.CHECKPOINT}",
        inputs=inputs,
        outputs=outputs,
        parameters=tuple(ParameterEntry(name=each, shape=own[each], trained=each in trained) for each in order),
        predicted_train_bytes=step_peak_bytes(
            shape,
            space,
            StepSetup(
                micro_batch=PREDICTED_BATCH,
                accumulation=1,
                optimizer="adamw",
                ever_trained_blocks=shape.depth - split,
                cached_blocks=split,
                may_prune=prunes,
                pooled=False,
            ),
        ),
    )


def _inputs(graph: Any) -> tuple[Input, ...]:
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.graph.initializer}
    return tuple(
        Input(
            name=value.name,
            dtype="int64" if value.type.tensor_type.elem_type == TensorProto.INT64 else "float32",
            shape=tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim),
        )
        for value in graph.graph.input
        if value.name not in weights
    )


def _graph_order(path: Path, parameters: dict[str, Any]) -> list[str]:
    """The parameters in the order in which the training graph takes them."""
    import onnx

    return [value.name for value in onnx.load(str(path)).graph.input if value.name in parameters]


def _share_weights(graph: Any, weights: Path) -> None:
    """Let the graph read what is in the weights' file from there: every prefix shares its bytes."""
    from onnx import TensorProto, numpy_helper

    with weights.open("rb") as file:
        header, entries = read_layout(file)
    places = dict(entries)
    for tensor in graph.graph.initializer:
        entry = places.get(tensor.name)
        if entry is None or entry.dtype != "F32" or tuple(tensor.dims) != entry.shape:
            continue
        if not numpy_helper.to_array(tensor).size:
            continue
        begin, end = entry.data_offsets
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", len(header) + begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))


def _adaptive(shape: ViTShape, variants: tuple[Variant, ...], settings: AlastSettings) -> Adaptive:
    above = {variant.name: shape.depth - variant.split_block for variant in variants}
    return Adaptive(
        settings=settings,
        token_floor={variant.name: default_token_floor(shape.depth, variant.split_block) for variant in variants},
        token_multiple=TOKEN_MULTIPLE,
        trained_blocks={name: max(1, round(DRAWN_SHARE * count)) if count else 0 for name, count in above.items()},
    )


def _classifier(model: Any) -> str | None:
    """The name of the classifier, where it is one linear layer."""
    from torch import nn

    head = model.get_classifier()
    if not isinstance(head, nn.Linear) or head.bias is None:
        return None
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _notes(model: Any) -> list[str]:
    from torch.nn.modules.dropout import _DropoutNd

    random = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, _DropoutNd) and module.p > 0) or getattr(module, "drop_prob", None)
    ]
    notes = []
    if random:
        notes.append(
            f"the graphs drop nothing at random, though the model would: {', '.join(random[:3])} and the like are left out"
        )
    if type(model.patch_embed).__name__ == HYBRID_STEM:
        notes.append(
            f"no variant trains the lowest blocks: ONNX Runtime has no training graph of the stem ({HYBRID_STEM})"
        )
    return notes


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """manifest.json with the hash of every file that is there; read back as a device would."""
    files = {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
        for name in files_in(folder)
    }
    complete = msgspec.structs.replace(manifest, files=files)
    write_atomically(folder / MANIFEST_FILE, msgspec.json.format(msgspec.json.encode(complete), indent=1) + b"\n")
    return read_manifest(folder)


def main() -> int:
    folder = Path(sys.argv[1])
    request_file = folder / REQUEST_FILE
    request = msgspec.json.decode(request_file.read_bytes(), type=ExportRequest)
    request_file.unlink()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        manifest, model = build(folder, request)
        manifest = write_manifest(folder, manifest)
        if request.verify:
            from edgetune.export.parity import verify

            found = verify(folder, manifest, model, threads=request.threads)
            (folder / PARITY_FILE).write_bytes(msgspec.json.encode(found))
    except EdgetuneError as error:
        (folder / ERROR_FILE).write_text(f"{type(error).__name__}\n{error}", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
