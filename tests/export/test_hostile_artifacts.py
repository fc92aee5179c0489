"""Artifacts that reach for other files, or whose graphs are not what their manifest says, are refused before they are opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import make_images
from running import cli

onnx = pytest.importorskip("onnx", reason="the export extra makes artifacts")
pytest.importorskip("torch", reason="torch makes the artifacts")

from edgetune.artifacts.agreement import check_variant
from edgetune.artifacts.importing import import_parameters
from edgetune.artifacts.manifest import MANIFEST_FILE
from edgetune.artifacts.reading import file_sha256, read_manifest
from edgetune.backends import ort
from edgetune.backends.ort import OrtBackend, load_variant
from edgetune.errors import ArtifactsError
from edgetune.optim import OptimizerSettings

PREFIX = "prefix-upper-2.onnx"


@pytest.fixture
def folder(artifacts: Path, tmp_path: Path) -> Path:
    """A copy to do damage to."""
    return Path(shutil.copytree(artifacts, tmp_path / "artifacts"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as JSON; files are listed as they are now."""
    value = json.loads((folder / MANIFEST_FILE).read_text())
    edit(value)
    for name, entry in value["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    (folder / MANIFEST_FILE).write_text(json.dumps(value))


def check(folder: Path, name: str = "upper-2") -> None:
    manifest = read_manifest(folder)
    check_variant(folder, manifest, manifest.variant(name))


def refused(folder: Path, words: str, name: str = "upper-2") -> None:
    with pytest.raises(ArtifactsError, match=rf"{words}.*[Ee]xport it again"):
        check(folder, name)


def edit_graph(folder: Path, name: str, edit: Callable[[Any], object]) -> None:
    graph = onnx.load(str(folder / name), load_external_data=False)
    edit(graph)
    (folder / name).write_bytes(graph.SerializeToString())
    change(folder, lambda _value: None)


def stored_outside(graph: Any) -> list[Any]:
    """Of each tensor in another file, its entries by name."""
    return [
        {entry.key: entry for entry in each.external_data} for each in graph.graph.initializer if each.external_data
    ]


def external(location: str, name: str = "secret") -> Any:
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.mark.parametrize("name", ["all", "upper-2", "head"])
def test_what_was_exported_is_what_its_manifest_says(artifacts: Path, name: str) -> None:
    check(artifacts, name)


@pytest.mark.parametrize(
    "location",
    [
        "../../other/model.safetensors",
        "/etc/passwd",
        "head/../model.safetensors",
        "manifest.json",
        "",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_a_graph_that_reaches_for_another_file_is_refused(folder: Path, location: str) -> None:
    def move(graph: Any) -> None:
        stored_outside(graph)[0]["location"].value = location

    edit_graph(folder, PREFIX, move)
    refused(folder, rf"{PREFIX} and the manifest contradict .* is the only file for that")


@pytest.mark.parametrize(
    "name",
    ["upper-2/training_model.onnx", "upper-2/eval_model.onnx", "optimizer_adamw.onnx", "optimizer_sgd_scheduled.onnx"],
)
@pytest.mark.parametrize("location", ["../model.safetensors", "/etc/passwd"])
def test_no_graph_beside_the_prefix_may_reach_for_any_file(folder: Path, name: str, location: str) -> None:
    edit_graph(folder, name, lambda graph: graph.graph.initializer.append(external(location)))
    refused(folder, rf"{name} and the manifest contradict .* is the only file for that")


def test_a_tensor_in_a_nodes_attribute_may_not_reach_out_either(folder: Path) -> None:
    def hide(graph: Any) -> None:
        node = next(each for each in graph.graph.node if each.op_type == "Constant")
        node.attribute[0].t.CopyFrom(external("../../secret"))

    edit_graph(folder, PREFIX, hide)
    refused(folder, "is the only file for that")


@pytest.mark.parametrize(("key", "value"), [("offset", "0"), ("length", "999999999"), ("offset", "-8")])
def test_a_graph_reads_each_tensor_from_its_own_place(folder: Path, key: str, value: str) -> None:
    def move(graph: Any) -> None:
        stored_outside(graph)[0][key].value = value

    edit_graph(folder, PREFIX, move)
    refused(folder, "is not where it lies in model.safetensors")


def test_a_second_location_does_not_hide_behind_the_first(folder: Path) -> None:
    def double(graph: Any) -> None:
        tensor = next(each for each in graph.graph.initializer if each.external_data)
        tensor.external_data.add(key="location", value="model.safetensors")
        tensor.external_data[0].value = "/etc/passwd"

    edit_graph(folder, PREFIX, double)
    refused(folder, "is the only file for that")


def test_what_the_runtime_would_read_beside_a_checkpoint_is_refused(folder: Path) -> None:
    (folder / "upper-2" / "checkpoint.data").symlink_to("/etc/passwd")
    refused(folder, "checkpoint.data: the runtime would read it")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda value: value["shape"].update(classes=5), "the classifier is|targets"),
        (lambda value: (value["shape"].update(depth=1000), value.update(adaptive=None)), "holds 4 blocks, not 1000"),
        (lambda value: (value["shape"].update(depth=5), value.update(adaptive=None)), "holds 4 blocks, not 5"),
        (lambda value: value["shape"].update(width=128), "has a width of 48, not 128"),
        (lambda value: value["preprocess"].update(height_px=64, width_px=64), r"images is .*not \[.*3, 64, 64\]"),
        (lambda value: value.update(classifier="nope"), "the classifier, 'nope'"),
        (lambda value: value["variants"][1].update(outputs=["loss", "logits", "head_inputs"]), "it gives loss, logits, head"),
        (lambda value: value["variants"][1]["outputs"].append("more"), "it gives loss, logits, head"),
        (lambda value: value["variants"][1]["inputs"].pop(), r"upper-2/.*it takes tokens \[4\], not blocks.2.norm1.weight"),
        (lambda value: value["variants"][1]["prefix_inputs"].pop(), "prefix-.*it takes .*, not images"),
        (lambda value: value["variants"][1]["prefix_outputs"].pop(), "it gives features, deltas, not features"),
        (lambda value: value["variants"][1]["inputs"][0].update(dtype="int64"), "it takes features"),
        (lambda value: value["variants"][1].update(training_graph="all/training_model.onnx"), "all/training_model.onnx and"),
        (lambda value: value["variants"][1].update(eval_graph="all/eval_model.onnx"), "all/eval_model.onnx and"),
        (lambda value: value["variants"][1].update(prefix_graph="prefix-head.onnx"), "prefix-head.onnx and"),
        (lambda value: value["variants"][1].update(split_block=1), "comes out as"),
        (lambda value: value["variants"][1]["parameters"].reverse(), "it takes blocks.2.norm1.weight"),
        (lambda value: value["variants"][1]["parameters"].pop(), "it takes|the classifier|parameters"),
        (lambda value: value["variants"][1]["parameters"][0].update(trained=False), "it gives gradients for"),
        (lambda value: value["variants"][1]["parameters"][0].update(shape=[1, 2, 3]), r"blocks.2.norm1.weight is float32 \[48\]"),
    ],
)  # fmt: skip
def test_a_manifest_that_its_graphs_contradict_is_refused(
    folder: Path, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    change(folder, edit)
    refused(folder, words)


def test_a_checkpoint_with_other_parameters_is_told_by_name_and_folder(folder: Path) -> None:
    manifest = read_manifest(folder)
    variant = manifest.variant("upper-2")
    first, *others = variant.parameters
    import msgspec

    claimed = msgspec.structs.replace(first, shape=(1, 2, 3))
    changed = msgspec.structs.replace(variant, parameters=(claimed, *others))
    words = rf"{folder}: the checkpoint of variant upper-2 has {first.name} as float32 \[48\], the manifest as .*\[1, 2, 3\].*Export"
    with pytest.raises(ArtifactsError, match=words):
        load_variant(folder, changed, 1)


@pytest.mark.parametrize("name", ["upper-2/training_model.onnx", "upper-2/checkpoint", PREFIX])
def test_what_the_runtime_refuses_is_told_in_words(folder: Path, name: str) -> None:
    """Behind the checks: graphs whose inside is damaged."""
    manifest = read_manifest(folder)
    variant = manifest.variant("upper-2")
    backend = OrtBackend(folder, manifest, variant, OptimizerSettings(name="sgd"))
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    with pytest.raises(ArtifactsError, match=r"can't be loaded.*export it again"):
        backend.evaluate(np.zeros((1, 3, 32, 32), np.float32))


def test_a_graph_that_fails_as_it_runs_is_told_in_words_and_lack_of_memory_is_passed_on(folder: Path) -> None:
    told = pytest.raises(ArtifactsError, match=r"x can't be run: Non-zero status code returned.*export it again")
    with told, ort._in_words(folder, "x can't be run", ort._REFUSALS):
        raise RuntimeError("Non-zero status code returned while running MatMul")
    for text in ("Non-zero status code returned: Failed to allocate memory", "something else"):
        with pytest.raises(RuntimeError, match=text), ort._in_words(folder, "x", ort._REFUSALS):
            raise RuntimeError(text)


def test_a_run_that_turns_to_another_variant_looks_at_it_first(folder: Path) -> None:
    edit_graph(
        folder, "prefix-head.onnx", lambda graph: stored_outside(graph)[0]["location"].MergeFromString(b"\x12\x01x")
    )
    manifest = read_manifest(folder)
    backend = OrtBackend(folder, manifest, manifest.variant("upper-2"), OptimizerSettings(name="sgd"))
    with pytest.raises(ArtifactsError, match="is the only file for that"):
        backend.use_split(4, embeddings_train=False)


def test_parameters_that_the_model_lacks_are_not_imported(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda value: value["variants"][1]["parameters"][0].update(name="zzz"))
    count = sum(int(np.prod(each.shape)) for each in read_manifest(folder).variant("upper-2").parameters)
    np.zeros(count, "<f4").tofile(tmp_path / "buffer")
    with pytest.raises(ArtifactsError, match=r"it lacks parameter zzz.*Export it again"):
        import_parameters(tmp_path / "buffer", folder, tmp_path / "model")


def test_the_command_refuses_with_one_line_and_leaves_no_run(folder: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "data", {"cat": 8, "dog": 8})
    run = ("finetune", "--backend", "ort", "--artifacts", folder, "--data", images, "--split", "2", "--steps", "1", "--output", tmp_path / "run")  # fmt: skip
    edit_graph(folder, PREFIX, lambda graph: setattr(stored_outside(graph)[0]["location"], "value", "../../nowhere"))
    done = cli(*run)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "to be read from '../../nowhere'" in done.stderr
    assert not (tmp_path / "run").exists()
    (folder / MANIFEST_FILE).unlink()
    os.mkfifo(folder / MANIFEST_FILE)
    done = cli(*run)
    assert done.returncode == 1
    assert "is no plain file" in done.stderr
