"""Reading a folder of artifacts that may have come from anywhere: nothing outside it is touched, nothing damaged is used."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

from edgetune.artifacts.manifest import MANIFEST_FILE, RUNTIME_VERSION, Manifest, Variant
from edgetune.checkpoint.files import disk_errors
from edgetune.cost import ViTShape
from edgetune.errors import ArtifactsError

_MAX_MANIFEST_BYTES = 16 * 1024**2
_CHUNK_BYTES = 1024**2
# By another name the runtime would take a file for a format of its own, which nobody looks into here.
GRAPH_SUFFIX = ".onnx"
# No Vision Transformer is as large: planning for what a hostile manifest claims must not take the machine's memory.
_MOST = {"depth": 1024, "classes": 1_000_000, "patch_tokens": 2**20, "prefix_tokens": 2**10}
_MOST_ELSE = 2**17
_MOST_PARAMETERS = 2**40
# What timm's names of Vision Transformers begin with (vision_transformer.py, deit.py, vision_transformer_hybrid.py).
_ARCHITECTURES = ("vit_", "deit_", "deit3_", "flexivit_", "eva_", "beit3_", "aimv2_", "test_vit")


def read_manifest(folder: Path) -> Manifest:
    """The manifest, with all that it says of itself checked; files are checked by `check_files`.

    Raises: ArtifactsError for one that is missing, damaged, of another version, contradicts itself or names a path that
    leaves the folder.
    """
    path = folder / MANIFEST_FILE
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise _is_a_link(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device never ends
            raise _is_not_plain(path)
        if status.st_size > _MAX_MANIFEST_BYTES:
            raise ArtifactsError(f"{path} is damaged: no manifest is as large.")
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactsError(
            f"{path} can't be read ({error.strerror or type(error).__name__}). Wanted: a folder that `edgetune export` wrote."
        ) from error
    try:
        version = msgspec.json.decode(data, type=_Version)
        if (version.format_version, version.kind) != (1, "onnxruntime-training"):
            raise ArtifactsError(
                f"{path} has format {version.format_version} ({version.kind}); this edgetune reads format 1 of "
                "onnxruntime-training. Export it again with this edgetune."
            )
        if version.runtime != RUNTIME_VERSION:
            raise ArtifactsError(
                f"{path} is of ONNX Runtime {version.runtime}; this edgetune trains with {RUNTIME_VERSION}. Export it again "
                "with this edgetune."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ArtifactsError(f"{path} is damaged: {error}. Export it again.") from error
    wrong = list(_contradictions(manifest))
    if wrong:
        raise ArtifactsError(f"{path} is damaged: {'; '.join(wrong[:5])}. Export it again.")
    return manifest


class _Version(msgspec.Struct):
    format_version: int
    kind: str
    runtime: str = RUNTIME_VERSION


def paths_of(manifest: Manifest, variant: Variant) -> tuple[str, ...]:
    """The files that training this variant reads, the weights apart."""
    own = (variant.prefix_graph, variant.training_graph, variant.eval_graph, variant.checkpoint)
    optimizers = [path for files in manifest.optimizers.values() for path in (files.plain, files.scheduled)]
    return (*(path for path in own if path is not None), *optimizers)


def graphs_of(manifest: Manifest) -> set[str]:
    """Every graph of the folder."""
    checkpoints = {variant.checkpoint for variant in manifest.variants}
    return {path for variant in manifest.variants for path in paths_of(manifest, variant)} - checkpoints


def is_inside(path: str) -> bool:
    """Whether a path is relative, plain and stays in its folder: no `..`, no root, drive or backslash."""
    parts = path.split("/")
    plain = path == str(PurePosixPath(path)) and not path.startswith("/")
    return plain and all(part not in ("", ".", "..") for part in parts) and not set(path) & set('\\:\0"*?<>|')


def check_files(folder: Path, manifest: Manifest, only: tuple[str, ...] | None = None) -> None:
    """That every file (or those of `only`) is a plain file inside the folder with the bytes that the manifest names.

    Raises: ArtifactsError naming the first that is not.
    """
    root = folder.resolve()
    for name in manifest.files if only is None else only:
        entry = manifest.files[name]
        path = folder / name
        check_plain(folder, name)
        with disk_errors(path, "read"):
            if root not in path.resolve().parents:
                raise ArtifactsError(f"{path} leads out of its folder. Export it again.")
            found = path.stat().st_size
            if found != entry.bytes:
                raise ArtifactsError(f"{path} is damaged: {found} bytes instead of {entry.bytes}. Export it again.")
            if file_sha256(path) != entry.sha256:
                raise ArtifactsError(
                    f"{path} is damaged: its bytes are not those that were exported (SHA-256 differs). Export it again."
                )


def check_plain(folder: Path, name: str) -> None:
    """That no link is on the way to a file of the folder, and a plain file at its end. Raises: ArtifactsError."""
    path = folder
    for part in name.split("/"):
        path = path / part
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            raise ArtifactsError(
                f"{folder / name} is missing ({error.strerror or type(error).__name__}). Copy the whole folder, or export it again."
            ) from error
        if stat.S_ISLNK(mode):
            raise _is_a_link(path)
    if not stat.S_ISREG(mode):
        raise _is_not_plain(path)


def _is_not_plain(path: Path) -> ArtifactsError:
    return ArtifactsError(f"{path} is no plain file. Copy the file itself there, or export it again.")


def _is_a_link(path: Path) -> ArtifactsError:
    return ArtifactsError(f"{path} is a link; artifacts are plain files. Copy the file itself there.")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_in(folder: Path) -> Iterator[str]:
    """Every file of a folder but the manifest, as paths of the manifest."""
    for root, _, names in os.walk(folder):
        for name in sorted(names):
            path = (Path(root) / name).relative_to(folder).as_posix()
            if path != MANIFEST_FILE:
                yield path


def _contradictions(manifest: Manifest) -> Iterator[str]:
    depth, shape = manifest.shape.depth, manifest.shape
    named = [manifest.weights, *(path for variant in manifest.variants for path in paths_of(manifest, variant))]
    for path in {*named, *manifest.files}:
        if not is_inside(path):
            yield f"{path!r} is no path inside the folder"
    for path in set(named) - set(manifest.files):
        yield f"{path!r} is used and not listed in `files`"
    yield from _wrong_sizes(shape)
    if manifest.config.get("architecture", manifest.architecture) != manifest.architecture:
        yield "its config is of another architecture"
    if not manifest.architecture.startswith(_ARCHITECTURES):
        yield f"{manifest.architecture[:60]!r} is no Vision Transformer of timm's"
    if not manifest.variants:
        yield "it has no variant"
    names = [variant.name for variant in manifest.variants]
    if len(set(names)) != len(names):
        yield "two variants have the same name"
    if len(manifest.classes) not in (0, shape.classes) or shape.classes < 1:
        yield f"it names {len(manifest.classes)} classes of {shape.classes}"
    if len(set(manifest.classes)) < len(manifest.classes):
        yield "it names a class twice"
    if not {"adamw", "sgd"} <= set(manifest.optimizers):
        yield "an optimizer is missing"
    if manifest.adaptive is not None:
        if set(names) - set(manifest.adaptive.token_floor):
            yield "token_floor lacks a variant"
        if not all(0 < share <= 1 for share in manifest.adaptive.token_floor.values()):
            yield "a token_floor is no share"
        for variant in manifest.variants:
            drawn, above = manifest.adaptive.trained_blocks.get(variant.name), depth - variant.split_block
            if drawn is None or not min(1, above) <= drawn <= above:
                yield f"trained_blocks of variant {variant.name} is {drawn}, of {above} blocks"
    for variant in manifest.variants:
        yield from _wrong_in(variant, depth)
    for path in graphs_of(manifest):
        if not path.endswith(GRAPH_SUFFIX):
            yield f"{path!r} is no {GRAPH_SUFFIX} file"


def _wrong_sizes(shape: ViTShape) -> Iterator[str]:
    for name in ("depth", "width", "heads", "head_width", "mlp_width", "patch_tokens", "classes", "channels"):
        if not 1 <= getattr(shape, name) <= _MOST.get(name, _MOST_ELSE):
            yield f"a {name} of {getattr(shape, name)}"
    if not 0 <= shape.prefix_tokens <= _MOST["prefix_tokens"]:
        yield f"{shape.prefix_tokens} prefix tokens"
    if not all(1 <= side <= _MOST_ELSE for side in (*shape.image_px, *shape.patch_px)):
        yield "an image or a patch without pixels"
    for name in ("embed_parameters", "block_parameters", "head_parameters", "largest_parameter"):
        if not 0 <= getattr(shape, name) <= _MOST_PARAMETERS:
            yield f"{name} of {getattr(shape, name)}"


def _wrong_in(variant: Variant, depth: int) -> Iterator[str]:
    if variant.split_block > depth:
        yield f"variant {variant.name} is cut at block {variant.split_block} of {depth}"
    if (variant.prefix_graph is None) != (variant.split_block == 0):
        yield f"variant {variant.name}: a prefix is there where nothing lies below, or missing"
    if variant.embeddings_train and variant.split_block:
        yield f"variant {variant.name} trains embeddings that are in its prefix"
    first = "images" if variant.split_block == 0 else "features"
    if [each.name for each in variant.inputs][:2] != [first, "targets"]:
        yield f"variant {variant.name} takes other inputs than {first} and targets"
    if variant.outputs[:3] != ("loss", "logits", "head_inputs"):
        yield f"variant {variant.name} gives no loss and logits"
    parameters = [each.name for each in variant.parameters]
    if len(set(parameters)) != len(parameters) or not any(each.trained for each in variant.parameters):
        yield f"variant {variant.name} trains nothing, or one parameter twice"
