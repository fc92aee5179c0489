"""`edgetune export`: all of it or nothing, from a run or from scratch, and the way back from a phone's buffer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from doubles import make_images
from running import cli

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx", reason="the export extra makes artifacts")

import torch

from edgetune import errors
from edgetune.artifacts.manifest import Schedule
from edgetune.artifacts.reading import check_files, read_manifest
from edgetune.backends.ort import load_variant
from edgetune.checkpoint import load_tensors
from edgetune.export import build, command
from edgetune.export.build import ExportRequest
from edgetune.export.training import bake

SCHEDULE = Schedule(peak_rate=1e-3, warmup_steps=1, total_steps=10)


def request(model: Path | str, **changes: object) -> ExportRequest:
    given = {"class_count": 4, "splits": (4,), "schedule": SCHEDULE, "verify": False, **changes}
    return ExportRequest(model=f"local-dir:{model}" if isinstance(model, Path) else model, **given)  # type: ignore[arg-type]


def silent(_text: str) -> None: ...


def test_a_child_that_crashes_leaves_nothing_and_is_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "REQUEST_FILE", "other.json")  # the child finds no request
    with pytest.raises(errors.EdgetuneError, match=r"the export process ended with code 1: .*request.json"):
        command.export(request(tiny_model), tmp_path / "out", room_bytes=None, note=silent)
    assert list(tmp_path.iterdir()) == []


def test_what_the_child_refuses_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(errors.UnknownModel, match="vit_nothing"):
        command.export(request("vit_nothing"), tmp_path / "out", room_bytes=None, note=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_with_torch_fails_the_export_and_touches_nothing(tiny_model: Path, tmp_path: Path) -> None:
    from edgetune.export import parity

    found = parity.Parity(sgd_loss=2e-5, gradient=float("nan"))
    assert [line.split()[0] for line in found.failures()] == ["sgd_loss", "gradient"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(errors.RunFolderError, match="never overwritten"):
        command.export(request(tiny_model), tmp_path / "out", room_bytes=None, note=silent)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_parity_sees_a_graph_that_computes_something_else(artifacts: Path, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from edgetune.export.parity import verify
    from edgetune.vit.models import ModelSource, load_model

    copy = tmp_path / "artifacts"
    shutil.copytree(artifacts, copy)
    manifest = read_manifest(copy)
    model = load_model(ModelSource(name=manifest.model, pretrained=False), 4).model
    values = load_tensors(copy / manifest.weights)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    assert verify(copy, manifest, model).failures() == []
    optimizer = copy / manifest.optimizers["adamw"].plain
    graph = onnx.load(str(optimizer))
    bake(graph, SCHEDULE)  # a rate of its own
    onnx.save(graph, str(optimizer))
    manifest = build.write_manifest(copy, manifest)
    with pytest.raises(errors.ArtifactsError, match="do not train as torch does: rule differs"):
        verify(copy, manifest, model)


def test_the_command_exports_a_runs_model_with_its_head_and_classes(tiny_model: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "data", {"cat": 10, "dog": 10})
    done = cli(
        "finetune", "--model", f"local-dir:{tiny_model}", "--data", images, "--steps", "2", "--batch-size", "4",
        "--threads", "1", "--quiet", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "artifacts"
    done = cli("export", tmp_path / "run", "--output", out, "--split", "2", "--no-verify")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    check_files(out, manifest)
    assert manifest.classes == ("cat", "dog")
    own, exported = load_tensors(tmp_path / "run" / "model.safetensors"), load_tensors(out / manifest.weights)
    for name, value in own.items():
        np.testing.assert_array_equal(exported[name], value)

    # The way back: what a phone hands over is the runtime's own flat buffer.
    live = load_variant(out, manifest.variant("upper-2"), 1)
    live.values["head.weight"][:] += 1
    live.module.get_contiguous_parameters(False).numpy().astype("<f4").tofile(tmp_path / "buffer")
    done = cli("import-params", tmp_path / "buffer", "--artifacts", out, "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    back = load_tensors(tmp_path / "back" / "model.safetensors")
    np.testing.assert_array_equal(back["head.weight"], own["head.weight"] + 1)
    np.testing.assert_array_equal(back["blocks.0.attn.qkv.weight"], own["blocks.0.attn.qkv.weight"])
    import timm

    model = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    np.testing.assert_array_equal(model.state_dict()["head.weight"].numpy(), back["head.weight"])

    done = cli("evaluate", tmp_path / "back", "--data", images, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recall"].keys() == {"cat", "dog"}

    done = cli("export", tmp_path / "run", "--format", "onnx", "--output", tmp_path / "model.onnx")
    assert done.returncode == 0, done.stderr
    assert "logits within" in done.stderr
    graph = onnx.load(str(tmp_path / "model.onnx"))
    assert graph.opset_import[0].version >= 20
    assert {entry.key: entry.value for entry in graph.metadata_props}["labels"] == "cat\ndog"
    again = cli("export", tmp_path / "run", "--format", "onnx", "--output", tmp_path / "model.onnx")
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_variants_that_a_device_has_no_room_for_are_left_out(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def copied(work: Path, _request: object) -> None:
        shutil.copytree(artifacts, work, dirs_exist_ok=True)

    monkeypatch.setattr(command, "_build", copied)
    monkeypatch.setattr(command, "_measured", lambda _work, manifest: manifest)
    needs = {variant.name: variant.measured for variant in read_manifest(artifacts).variants}
    smallest = needs["head"]
    assert smallest is not None
    with pytest.raises(errors.DoesNotFit):
        command.export(request("x"), tmp_path / "none", room_bytes=1, note=silent)
    said: list[str] = []
    room = smallest.train[0].bytes * 103 // 100 + 12 * 2**20
    manifest = command.export(request("x"), tmp_path / "some", room_bytes=room, note=said.append)
    left_out = {"all", "upper-2", "head"} - {variant.name for variant in manifest.variants}
    assert left_out
    assert "head" not in left_out
    assert all(any(f"variant {name} is left out" in line for line in said) for name in left_out)
    check_files(tmp_path / "some", read_manifest(tmp_path / "some"))
    assert not (tmp_path / "some" / "all").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "edgetune_micro", "--classes", "3"), "--output"),
        (("--model", "edgetune_micro", "--output", "x"), "either --classes N or --data DIR"),
        (("RUN", "--model", "edgetune_micro", "--output", "x"), "leave --model"),
        (("--format", "onnx", "--classes", "3", "--output", "x"), "exports a run's model"),
        (("--classes", "3", "--split", "a", "--output", "x"), "--split takes"),
    ],
)
def test_what_makes_no_sense_together_is_a_usage_error(
    tmp_path: Path, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from edgetune.cli import app

    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["export", *arguments])
    assert isinstance(found.exception, errors.UsageError)
    assert words in str(found.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_names_what_made_it(artifacts: Path) -> None:
    value = json.loads((artifacts / "manifest.json").read_text())
    assert value["versions"].keys() >= {"python", "torch", "onnx", "timm", "onnxruntime-training-cpu"}
    assert build.MANIFEST_FILE == "manifest.json"


@pytest.mark.parametrize("splits", [(5,), (0, 5, 99)])
def test_a_block_that_the_model_has_not_is_a_usage_error(
    tiny_model: Path, tmp_path: Path, splits: tuple[int, ...]
) -> None:
    with pytest.raises(
        errors.UsageError, match=rf"--split {','.join(map(str, splits)).removeprefix('0,')}: the model has 4 blocks"
    ):
        command.export(request(tiny_model, splits=splits), tmp_path / "out", room_bytes=None, note=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_says_nothing_of_onnx_runtime_is_told_at_export() -> None:
    from edgetune.cli.export import _device_notes

    (note,) = _device_notes("jetson-nano")
    assert "jetson-nano states no runtime for ONNX Runtime ([runtime.ort] in its profile)" in note
    assert "--device auto" in note
    assert _device_notes("android-4gb") == _device_notes("auto") == _device_notes(None) == []


def test_a_hybrid_is_cut_above_its_stem_and_compared_with_torch(tmp_path: Path) -> None:
    hybrid = ("export", "--model", "vit_tiny_r_s16_p8_224", "--no-pretrained", "--image-size", "64", "--classes", "3")
    done = cli(*hybrid, "--split", "8", "--output", tmp_path / "hybrid")
    assert done.returncode == 0, done.stderr
    assert "as torch" in done.stdout + done.stderr
    manifest = read_manifest(tmp_path / "hybrid")
    assert [variant.split_block for variant in manifest.variants] == [8]
    assert "HybridEmbed" in manifest.notes[0]
    done = cli(*hybrid, "--split", "0,8", "--output", tmp_path / "whole")
    assert done.returncode == 1
    assert "can't be exported from block 0 up" in done.stderr
    assert "HybridEmbed with Sequential" in done.stderr


def test_blocks_without_a_gradient_graph_are_refused_by_name(tmp_path: Path) -> None:
    done = cli(
        "export", "--model", "vit_small_patch16_18x2_224", "--no-pretrained", "--image-size", "32", "--classes", "3",
        "--output", tmp_path / "parallel",
    )  # fmt: skip
    assert done.returncode == 1
    assert "ParallelThingsBlock" in done.stderr
    assert not (tmp_path / "parallel").exists()
