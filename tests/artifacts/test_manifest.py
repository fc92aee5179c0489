"""A folder of artifacts that came from anywhere is read whole and undamaged, or refused, with the reason."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from artifacts_cases import make_artifacts, write

from edgetune.artifacts.manifest import MANIFEST_FILE, Manifest, ladder, manifest_schema, variant_at
from edgetune.artifacts.reading import check_files, is_inside, read_manifest
from edgetune.errors import ArtifactsError, RunFolderError

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "artifacts.schema.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_artifacts(tmp_path / "artifacts")
    return tmp_path / "artifacts"


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as JSON."""
    value = json.loads((folder / MANIFEST_FILE).read_text())
    edit(value)
    (folder / MANIFEST_FILE).write_text(json.dumps(value))


def test_what_was_written_is_read_back_and_every_file_is_as_it_says(folder: Path) -> None:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert [variant.name for variant in manifest.variants] == ["all", "upper-2", "head"]
    jsonschema.validate(json.loads((folder / MANIFEST_FILE).read_text()), SCHEMA)


def test_the_schema_in_docs_is_what_the_code_says(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_schema", ROOT / "tools" / "make_schema.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert manifest_schema() == SCHEMA, "run tools/make_schema.py"
    assert tool.SCHEMAS["artifacts.schema.json"]() == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_ladder_is_all_the_upper_8_4_and_2_blocks_and_the_head_as_far_as_there_are_any() -> None:
    assert ladder(12) == (0, 4, 8, 10, 12)
    assert ladder(8) == (0, 4, 6, 8)
    assert ladder(2) == (0, 2)


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "a/../../evil",
        "/etc/passwd",
        "a//b",
        "./a",
        "a/",
        "",
        "..",
        "a\\b",
        "C:/a",
        "a\0b",
        "a/./b",
        "file://x",
    ],
)
def test_a_path_that_is_not_plain_and_inside_is_refused(folder: Path, path: str) -> None:
    assert not is_inside(path)
    change(folder, lambda value: value["variants"][0].update(checkpoint=path))
    with pytest.raises(ArtifactsError, match="is no path inside the folder"):
        read_manifest(folder)
    make_artifacts(folder)
    change(folder, lambda value: value["files"].update({path: {"bytes": 0, "sha256": "0" * 64}}))
    with pytest.raises(ArtifactsError, match="is no path inside the folder"):
        read_manifest(folder)


def test_a_link_is_refused_wherever_it_leads(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    checkpoint = folder / "all" / "checkpoint"
    elsewhere = tmp_path / "elsewhere"
    checkpoint.rename(elsewhere)
    checkpoint.symlink_to(elsewhere)
    with pytest.raises(ArtifactsError, match="is a link"):
        check_files(folder, manifest)
    checkpoint.unlink()
    (folder / "all").rename(tmp_path / "all")
    elsewhere.rename(tmp_path / "all" / "checkpoint")
    (folder / "all").symlink_to(tmp_path / "all")
    with pytest.raises(ArtifactsError, match="is a link"):
        check_files(folder, manifest)


def test_a_manifest_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    (folder / MANIFEST_FILE).rename(elsewhere)
    (folder / MANIFEST_FILE).symlink_to(elsewhere)
    with pytest.raises(ArtifactsError, match="is a link"):
        read_manifest(folder)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    os.mkfifo(folder / MANIFEST_FILE)
    with pytest.raises(ArtifactsError, match=r"manifest.json is no plain file"):
        read_manifest(folder)


def test_every_vision_transformer_of_timm_may_be_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    known = json.loads((ROOT / "edgetune" / "assets" / "models.json").read_text())
    others = (
        "vit_tiny_r_s16_p8_224",
        "aimv2_large_patch14_224",
        "beit3_base_patch16_224",
        "test_vit",
    )  # timm's to build
    for name in (*known, *others):
        config = {**manifest.config, "architecture": name}
        write(folder, msgspec.structs.replace(manifest, architecture=name, config=config))
        assert read_manifest(folder).architecture == name


def test_a_damaged_a_short_and_a_missing_file_are_told_by_name(folder: Path) -> None:
    manifest = read_manifest(folder)
    graph = folder / "upper-2" / "training_model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(b"X" + content[1:])
    with pytest.raises(ArtifactsError, match=r"upper-2/training_model.onnx is damaged.*SHA-256"):
        check_files(folder, manifest)
    graph.write_bytes(content[:-1])
    with pytest.raises(ArtifactsError, match=r"training_model.onnx is damaged.*bytes instead of"):
        check_files(folder, manifest)
    graph.unlink()
    with pytest.raises(ArtifactsError, match=r"training_model.onnx is missing"):
        check_files(folder, manifest)
    check_files(folder, manifest, ("model.safetensors",))  # what nobody reads is not looked at


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda value: value.update(format_version=2), "has format 2"),
        (lambda value: value.update(kind="executorch"), "executorch"),
        (lambda value: value.update(runtime="1.20.0"), "of ONNX Runtime 1.20.0"),
        (lambda value: value["shape"].update(depth=10**9), "a depth of 1000000000"),
        (lambda value: value["shape"].update(heads=0), "a heads of 0"),
        (lambda value: value["shape"].update(patch_px=[0, 0]), "without pixels"),
        (lambda value: value["shape"].update(block_parameters=10**15), "block_parameters"),
        (lambda value: value["config"].update(architecture="nonsense"), "another architecture"),
        (lambda value: value["adaptive"]["token_floor"].update(all=9.0), "no share"),
        (lambda value: value.update(surprise=1), "damaged"),
        (lambda value: value.update(opset=22), "damaged"),
        (lambda value: value.update(ir_version=11), "damaged"),
        (lambda value: value.update(variants=[]), "no variant"),
        (lambda value: value.update(classes=["one"]), "names 1 classes of 3"),
        (lambda value: value.update(classes=["ant", "bee", "bee"]), "names a class twice"),
        (lambda value: value["variants"].append(value["variants"][0]), "same name"),
        (lambda value: value["variants"][1].update(split_block=9), "cut at block 9 of 4"),
        (lambda value: value["variants"][1].update(prefix_graph=None), "prefix"),
        (lambda value: value["variants"][0]["inputs"].reverse(), "other inputs"),
        (lambda value: value["variants"][0].update(outputs=["logits", "loss"]), "no loss and logits"),
        (lambda value: value["files"].pop("all/checkpoint"), "not listed"),
        (lambda value: value["optimizers"].pop("sgd"), "optimizer is missing"),
        (lambda value: value["adaptive"].update(token_floor={}), "token_floor"),
        (lambda value: value["files"]["all/checkpoint"].update(sha256="0"), "damaged"),
        (
            lambda value: (value.update(architecture="resnet50"), value["config"].update(architecture="resnet50")),
            "'resnet50' is no Vision Transformer",
        ),
        (
            lambda value: value["adaptive"]["trained_blocks"].update({"upper-2": 0}),
            "trained_blocks of variant upper-2 is 0, of 2 blocks",
        ),
        (lambda value: value["adaptive"]["trained_blocks"].update({"upper-2": 99}), "is 99, of 2 blocks"),
        (lambda value: value["adaptive"]["trained_blocks"].update(head=1), "variant head is 1, of 0 blocks"),
        (lambda value: value["adaptive"].update(trained_blocks={}), "variant all is None"),
        (
            lambda value: (
                value["variants"][0].update(training_graph="all/graph.ort"),
                value["files"].update({"all/graph.ort": {"bytes": 0, "sha256": "0" * 64}}),
            ),
            "'all/graph.ort' is no .onnx file",
        ),
    ],
)
def test_a_manifest_that_is_of_another_version_or_contradicts_itself_is_refused(
    folder: Path, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    change(folder, edit)
    with pytest.raises(ArtifactsError, match=words):
        read_manifest(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"[" * 5000, b'{"format_version": 1}', b"{" + b'"a":{' * 4000]
)
def test_what_is_no_manifest_is_refused_in_words(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactsError, match="damaged"):
        read_manifest(folder)


def test_a_folder_without_a_manifest_says_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(ArtifactsError, match="edgetune export"):
        read_manifest(tmp_path)


def test_a_split_that_was_not_exported_is_told_with_those_that_were(folder: Path) -> None:
    manifest: Manifest = read_manifest(folder)
    assert variant_at(manifest, 2, embeddings_train=False).name == "upper-2"
    with pytest.raises(ArtifactsError, match=r"all \(from block 0 up\), upper-2 \(from block 2 up\), head"):
        variant_at(manifest, 3, embeddings_train=False)


def test_an_unreadable_file_is_an_error_of_the_disk(folder: Path) -> None:
    manifest = read_manifest(folder)
    write(folder, msgspec.structs.replace(manifest, model="other"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises((ArtifactsError, RunFolderError), match="no plain file"):
        check_files(folder, manifest)
