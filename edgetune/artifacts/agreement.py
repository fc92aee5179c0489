"""Whether what a manifest says of a model is what its weights and graphs are; no graph reaches for files of its own choice.

The runtime opens whatever file a graph names and trusts shapes until a kernel fails, so all of it is compared beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from edgetune.artifacts.graphs import Graph, OutsideTensor, Value, read_graph
from edgetune.artifacts.manifest import Input, Manifest, Variant
from edgetune.artifacts.reading import check_files, check_plain, paths_of
from edgetune.checkpoint.files import disk_errors
from edgetune.checkpoint.tensors import Entry, NotSafetensors, read_layout
from edgetune.cost import ViTShape
from edgetune.errors import ArtifactsError

# onnx.proto's TensorProto.DataType.
ELEMENT_TYPES = {"float32": 1, "int64": 7}
_FLOAT32 = "F32"
# The runtime's own additions to a training graph: a gradient's buffer, what it comes out as, and the flag that empties it.
_BUFFER, _SUM, _RESET = "_grad.accumulation.buffer", "_grad.accumulation.out", "lazy_reset_grad"
# Where the runtime looks for parts of a checkpoint that are not in it; an export writes none.
CHECKPOINT_DATA = ".data"
_MOST_SHOWN = 3


def check_weights(folder: Path, manifest: Manifest) -> dict[str, tuple[int, Entry]]:
    """That the weights are of the model that the manifest describes; of each tensor its first byte in the file, and entry.

    Reads the header alone: `check_files` says whether the bytes are those that were exported.

    Raises: ArtifactsError for weights that are missing, damaged or of another shape.
    """
    path = folder / manifest.weights
    check_plain(folder, manifest.weights)
    try:
        with disk_errors(path, "read"), path.open("rb") as file:
            header, entries = read_layout(file)
    except NotSafetensors as error:
        raise ArtifactsError(f"{path} is damaged: {error}. Export it again.") from error
    _refuse(folder, path.name, _against_weights(manifest, dict(entries)))
    return {name: (len(header) + entry.data_offsets[0], entry) for name, entry in entries}


def check_variant(folder: Path, manifest: Manifest, variant: Variant) -> None:
    """That training a variant reads plain, undamaged files of the folder, and graphs as the manifest says they are.

    To be called before the runtime opens any of them.

    Raises: ArtifactsError naming the first file that is not.
    """
    check_files(folder, manifest, (manifest.weights, *paths_of(manifest, variant)))
    beside = folder / f"{variant.checkpoint}{CHECKPOINT_DATA}"
    if beside.is_symlink() or beside.exists():
        raise ArtifactsError(
            f"{beside}: the runtime would read it as a part of the checkpoint, and an export writes no such file. "
            "Remove it, or export it again."
        )
    stored = check_weights(folder, manifest)
    for name in paths_of(manifest, variant):
        if name == variant.checkpoint:
            continue
        graph = read_graph(folder / name)
        _refuse(folder, name, _outside(graph.outside, name, manifest.weights, stored))
        if name == variant.prefix_graph:
            _refuse(folder, name, _against_prefix(graph, manifest, variant))
        elif name == variant.training_graph:
            _refuse(folder, name, _against_training(graph, manifest, variant))
        elif name == variant.eval_graph:
            _refuse(folder, name, _against_suffix(graph, manifest, variant))


def _refuse(folder: Path, name: str, wrong: Iterable[str]) -> None:
    found = list(wrong)
    if found:
        raise ArtifactsError(
            f"{folder}: {name} and the manifest contradict each other: {'; '.join(found[:_MOST_SHOWN])}. Export it again."
        )


# ------------------------------------------------------------------------------------------------------------ weights


def _against_weights(manifest: Manifest, entries: dict[str, Entry]) -> Iterator[str]:
    shape, classifier = manifest.shape, manifest.classifier
    blocks = {name.split(".")[1] for name in entries if name.startswith("blocks.")}
    if blocks != {str(block) for block in range(shape.depth)}:
        yield f"it holds {len(blocks)} blocks, not {shape.depth}"
    named = list(dict.fromkeys((each.name, each.shape) for variant in manifest.variants for each in variant.parameters))
    for name, sides in named:
        entry = entries.get(name)
        if entry is None:
            yield f"it lacks parameter {name}"
        elif (entry.dtype, entry.shape) != (_FLOAT32, sides):
            kind = "float32" if entry.dtype == _FLOAT32 else entry.dtype
            yield f"{name} is {kind} {list(entry.shape)}, not float32 {list(sides)}"
    if classifier is not None:
        parameters = dict(named)
        if not all(f"{classifier}.{part}" in parameters for part in ("weight", "bias")):
            yield f"the classifier, {classifier!r}, is no linear layer of the model"
        else:
            sides = parameters[f"{classifier}.weight"]
            if len(sides) != 2 or sides[0] != shape.classes or parameters[f"{classifier}.bias"] != (shape.classes,):
                yield f"the classifier is {list(sides)}, for {shape.classes} classes"
    yield from _against_shape(shape, {name: entry.shape for name, entry in entries.items()})


def _against_shape(shape: ViTShape, sides: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Sizes that show in timm's tensors, where a model has them."""
    claims: dict[str, tuple[str, object, object]] = {}
    if len(positions := sides.get("pos_embed", ())) == 3:
        claims["pos_embed"] = ("a width", positions[-1], shape.width)
        if not shape.patch_tokens <= positions[1] <= shape.all_tokens:
            yield f"pos_embed is of {positions[1]} tokens, not {shape.patch_tokens} and {shape.prefix_tokens} before them"
    if len(out := sides.get("blocks.0.mlp.fc2.weight", ())) == 2:
        claims["blocks.0.mlp.fc2.weight"] = ("widths", out, (shape.width, shape.mlp_width))
    if shape.fused_qkv and len(joint := sides.get("blocks.0.attn.qkv.weight", ())) == 2:
        claims["blocks.0.attn.qkv.weight"] = ("widths", joint, (3 * shape.attention_width, shape.width))
    for name, (what, found, wanted) in claims.items():
        if found != wanted:
            yield f"{name} has {what} of {found}, not {wanted}"


# ------------------------------------------------------------------------------------------------------------- graphs


def _outside(
    tensors: Iterable[OutsideTensor], name: str, weights: str, stored: dict[str, tuple[int, Entry]]
) -> Iterator[str]:
    """A graph may take tensors of the weights' file from there, at their places, and no other bytes from anywhere."""
    for tensor in tensors:
        places = dict(tensor.places)
        location = places.get("location", "")
        if len(places) < len(tensor.places) or str(PurePosixPath(name).parent / location) != weights:
            yield f"{tensor.name} is to be read from {location!r}, and {weights} is the only file for that"
            continue
        begin, entry = stored.get(tensor.name, (0, None))
        if entry is None:
            yield f"{weights} holds no {tensor.name}"
            continue
        length = entry.data_offsets[1] - entry.data_offsets[0]
        wanted = {"location": location, "offset": str(begin), "length": str(length)}
        if (places, tensor.element_type, tensor.sides) != (wanted, ELEMENT_TYPES["float32"], entry.shape):
            yield f"{tensor.name} is not where it lies in {weights}, or of another shape"


def _against_prefix(graph: Graph, manifest: Manifest, variant: Variant) -> Iterator[str]:
    shape = manifest.shape
    yield from _wrong_inputs(graph.inputs, variant.prefix_inputs, exactly=True)
    yield from _wrong_sizes(variant.prefix_inputs, manifest)
    yield from _wrong_outputs([each.name for each in graph.outputs], variant.prefix_outputs)
    # A deltas of every block below the split, and what enters the first above it.
    yield from _wrong_sides(
        graph.outputs, {"features": ("batch", "stream", shape.width), "deltas": (variant.split_block,)}
    )


def _against_training(graph: Graph, manifest: Manifest, variant: Variant) -> Iterator[str]:
    trained = {each.name for each in variant.parameters if each.trained}
    buffers = [each.name for each in graph.inputs if each.name.endswith(_BUFFER)]
    if {name.removesuffix(_BUFFER) for name in buffers} != trained:
        yield f"it gives gradients for {len(buffers)} parameters, not for the {len(trained)} that train"
    own = tuple(each for each in graph.inputs if not each.name.endswith(_BUFFER) and each.name != _RESET)
    outputs = tuple(each for each in graph.outputs if not each.name.endswith(_SUM))
    yield from _against_suffix(Graph(own, outputs, ()), manifest, variant)


def _against_suffix(graph: Graph, manifest: Manifest, variant: Variant) -> Iterator[str]:
    shape, count = manifest.shape, len(variant.inputs)
    yield from _wrong_inputs(graph.inputs[:count], variant.inputs, exactly=False)
    yield from _wrong_sizes(variant.inputs, manifest)
    found = [(each.name, each.sides) for each in graph.inputs[count:]]
    wanted = [(each.name, each.shape) for each in variant.parameters]
    if found != wanted:
        pairs = ((there, here) for there, here in zip(found, wanted, strict=False) if there != here)
        there, here = next(pairs, (f"{len(found)} parameters", f"{len(wanted)}"))
        yield f"it takes {_shown(there)}, not {_shown(here)}"
    yield from _wrong_outputs([each.name for each in graph.outputs], variant.outputs)
    above = shape.depth - variant.split_block
    yield from _wrong_sides(graph.outputs, {"logits": ("batch", shape.classes), "deltas": (above,)})


def _shown(part: object) -> str:
    return f"{part[0]} {list(part[1])}" if isinstance(part, tuple) else str(part)


def _wrong_inputs(found: tuple[Value, ...], wanted: tuple[Input, ...], *, exactly: bool) -> Iterator[str]:
    there = [(each.name, each.element_type, each.sides) for each in found]
    here = [(each.name, ELEMENT_TYPES[each.dtype], each.shape) for each in wanted]
    if there != here:
        yield (
            f"it takes {', '.join(f'{name} {list(sides)}' for name, _, sides in there[:4])}"
            f"{' first' if not exactly else ''}, not {', '.join(f'{name} {list(sides)}' for name, _, sides in here[:4])}"
        )


def _wrong_sizes(inputs: tuple[Input, ...], manifest: Manifest) -> Iterator[str]:
    """Inputs that the manifest's own shape and preprocessing do not go with."""
    shape, preprocess = manifest.shape, manifest.preprocess
    wanted = {
        "images": ("batch", shape.channels, preprocess.height_px, preprocess.width_px),
        "features": ("batch", "stream", shape.width),
        "targets": ("batch", shape.classes),
        "tokens": (shape.depth,),
    }
    for each in inputs:
        if each.name not in wanted:
            yield f"an input {each.name!r}, which nobody feeds"
        elif not _fits(each.shape, wanted[each.name]):
            yield f"{each.name} is {list(each.shape)}, not {list(wanted[each.name])}"


def _wrong_outputs(found: list[str], wanted: tuple[str, ...]) -> Iterator[str]:
    if found != list(wanted):
        yield f"it gives {', '.join(found[:6])}, not {', '.join(wanted[:6])}"


def _wrong_sides(outputs: tuple[Value, ...], wanted: dict[str, tuple[int | str, ...]]) -> Iterator[str]:
    for each in outputs:
        if each.name in wanted and not _fits(each.sides, wanted[each.name]):
            yield f"{each.name} comes out as {list(each.sides)}, not {list(wanted[each.name])}"


def _fits(sides: tuple[int | str, ...], wanted: tuple[int | str, ...]) -> bool:
    """Whether two shapes agree in the sizes that both name."""
    if len(sides) != len(wanted):
        return False
    pairs = zip(sides, wanted, strict=True)
    return all(found == size for found, size in pairs if isinstance(found, int) and isinstance(size, int))
