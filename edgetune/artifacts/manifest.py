"""`manifest.json`: what a folder of training artifacts holds, and all that a device needs to know to train from it.

Values alone; `reading.py` reads and checks them. Its schema is `docs/artifacts.schema.json`.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

import msgspec

from edgetune.alast import AlastSettings
from edgetune.cost import ViTShape
from edgetune.data.preprocess import Preprocess
from edgetune.errors import ArtifactsError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
# The last release with training packages, whose checkpoints no other reads.
RUNTIME_VERSION = "1.19.2"
# What the runtime that trains can load, and nothing newer.
MOST_OPSET, MOST_IR = 21, 10

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def _is(description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description)


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class FileEntry(_Value, frozen=True, kw_only=True):
    """One file of the folder."""

    bytes: Count
    sha256: Sha256


class Input(_Value, frozen=True, kw_only=True):
    """One input of a graph. Feed them in the order of this list: some runtimes know no names."""

    name: Annotated[str, _is("images, features, targets or tokens")]
    dtype: Literal["float32", "int64"]
    shape: Annotated[tuple[int | str, ...], _is("a word stands for a size that may change")]


class ParameterEntry(_Value, frozen=True, kw_only=True):
    """One parameter, named as timm names it."""

    name: str
    shape: tuple[Count, ...]
    trained: Annotated[bool, _is("the training graph gives a gradient for it")]


class MeasuredPeak(_Value, frozen=True, kw_only=True):
    """Peak of a fresh process above what it held after importing the runtime."""

    batch: Positive
    tokens_share: Annotated[float, msgspec.Meta(gt=0, le=1, description="of the patch tokens, in every block above")]
    bytes: Count


class Measured(_Value, frozen=True, kw_only=True):
    """What this variant was measured to take on the machine that exported it."""

    prefix: Annotated[tuple[MeasuredPeak, ...], _is("images through the frozen prefix, nothing else in memory")] = ()
    train: Annotated[tuple[MeasuredPeak, ...], _is("a training step of the suffix, optimizer state apart")] = ()
    evaluate: Annotated[tuple[MeasuredPeak, ...], _is("the eval graph of the suffix, the training graph loaded")] = ()
    reserved_bytes: Annotated[Count, _is("address space that the runtime's arena takes and never touches")] = 0


class Variant(_Value, frozen=True, kw_only=True):
    """One choice of what may train: everything from `split_block` up."""

    name: str
    split_block: Annotated[Count, _is("blocks below it are in the prefix and never train")]
    embeddings_train: bool = False
    prefix_graph: Annotated[str | None, _is("inference graph of what lies below; null: nothing does")] = None
    prefix_inputs: tuple[Input, ...] = ()
    prefix_outputs: tuple[str, ...] = ()
    training_graph: str
    eval_graph: str
    checkpoint: str
    inputs: Annotated[tuple[Input, ...], _is("of the training and the eval graph")]
    outputs: Annotated[
        tuple[str, ...], _is("loss, logits, head_inputs and, where blocks run, deltas of the class token")
    ]
    parameters: Annotated[tuple[ParameterEntry, ...], _is("in the order of the graph's inputs")]
    predicted_train_bytes: Annotated[Count, _is("of a training step by torch's memory model, batch 8")]
    measured: Measured | None = None


class OptimizerFiles(_Value, frozen=True, kw_only=True):
    """Graphs of one optimizer's update; they serve every variant."""

    plain: Annotated[str, _is("takes the rate that the runtime sets")]
    scheduled: Annotated[str, _is("for runtimes without a setter, which feed 0.001: has the schedule in it")]


class Schedule(_Value, frozen=True, kw_only=True):
    """The rate of each step: linear up to `peak_rate` over `warmup_steps`, then a cosine to zero at `total_steps`."""

    peak_rate: float
    warmup_steps: Count
    total_steps: Positive


class Adaptive(_Value, frozen=True, kw_only=True):
    """What ALaST needs to know; see docs/decisions/0003-alast.md for the rule."""

    settings: AlastSettings
    token_floor: Annotated[dict[str, float], _is("by variant: least share of its patch tokens that a block passes on")]
    token_multiple: Annotated[Positive, _is("token counts go up to a multiple of this")]
    trained_blocks: Annotated[dict[str, Count], _is("by variant: K, blocks drawn a step")]


class Manifest(_Value, frozen=True, kw_only=True):
    """All of it. Paths are relative to the folder and stay inside it."""

    format_version: Literal[1] = 1
    kind: Literal["onnxruntime-training"] = "onnxruntime-training"
    runtime: Annotated[str, _is("the version whose checkpoints these are")] = RUNTIME_VERSION
    opset: Annotated[int, msgspec.Meta(ge=1, le=MOST_OPSET)]
    ir_version: Annotated[int, msgspec.Meta(ge=1, le=MOST_IR)]
    versions: Annotated[dict[str, str], _is("of what exported it")]
    model: Annotated[str, _is("timm's name, or the bundled model's")]
    architecture: str
    model_args: dict[str, Any] = {}
    shape: ViTShape
    preprocess: Preprocess
    classes: Annotated[tuple[str, ...], _is("one a logit; empty: not named yet")]
    config: Annotated[dict[str, Any], _is("config.json of a run folder, which timm loads")]
    classifier: Annotated[
        str | None, _is("the one linear layer that makes the logits of `head_inputs`, if one does")
    ] = None
    weights: Annotated[str, _is("safetensors: every tensor of the model as it is before training")]
    variants: tuple[Variant, ...]
    optimizers: dict[str, OptimizerFiles]
    weight_decay: Annotated[float, _is("of the optimizer graphs, for every parameter alike")]
    schedule: Schedule
    adaptive: Annotated[Adaptive | None, _is("null: tokens can't be pruned in this model")]
    notes: tuple[str, ...] = ()
    files: Annotated[dict[str, FileEntry], _is("every other file of the folder by its path")]

    def variant(self, name: str) -> Variant:
        """Raises: KeyError."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)


def variant_name(split_block: int, depth: int, *, embeddings_train: bool) -> str:
    """`full`, `all`, `upper-4`, `head`."""
    if embeddings_train:
        return "full"
    if split_block == 0:
        return "all"
    return "head" if split_block == depth else f"upper-{depth - split_block}"


def variant_at(manifest: Manifest, split_block: int, *, embeddings_train: bool) -> Variant:
    """The variant that trains from a block up. Raises: ArtifactsError naming those that there are."""
    for variant in manifest.variants:
        if (variant.split_block, variant.embeddings_train) == (split_block, embeddings_train):
            return variant
    raise ArtifactsError(
        f"the plan trains from block {split_block} up, and the artifacts hold {cuts(manifest)}. Export them again with "
        f"--split {split_block}, or leave --plan out."
    )


def cuts(manifest: Manifest) -> str:
    """The variants, in words."""
    return ", ".join(f"{variant.name} (from block {variant.split_block} up)" for variant in manifest.variants)


def ladder(depth: int) -> tuple[int, ...]:
    """Split blocks of the variants, lowest first: everything, the upper 8, 4 and 2 blocks, the head."""
    return tuple(sorted({0, depth, *(depth - upper for upper in (8, 4, 2) if upper < depth)}))


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of `manifest.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Manifest)}
    plain: dict[str, Any] = _plain(msgspec.json.decode(msgspec.json.encode(schema)))
    return plain


def _plain(part: Any) -> Any:
    """Descriptions without the indentation of docstrings, which Python keeps up to 3.12; no defaults that are lists, which
    a named tuple's are.
    """
    if not isinstance(part, dict):
        return part
    return {
        name: inspect.cleandoc(value) if name == "description" and isinstance(value, str) else _plain(value)
        for name, value in part.items()
        if not (name == "default" and isinstance(value, list))
    }
