"""Runs on the bundled model, from settings to a run folder, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from doubles import make_images
from PIL import Image
from running import Witness, cli, finetune, losses, settings

pytest.importorskip("torch")
pytest.importorskip("timm")

import timm
import torch
from jsonschema import Draft202012Validator
from safetensors.numpy import load_file

from edgetune import devices, memory, run
from edgetune.data import open_folder
from edgetune.devices import find_device
from edgetune.errors import CapExceeded, DataError, DoesNotFit, EdgetuneError, RunFolderError, UsageError, WeightsError
from edgetune.planner import replayed
from edgetune.report import RunReport, read_report
from edgetune.store import read_plan
from edgetune.units import MIB
from edgetune.vit.models import MICRO_FOLDER

REPOSITORY = Path(__file__).parents[1]
FILES = {
    "model.safetensors",
    "config.json",
    "labels.txt",
    "images.txt",
    "plan.json",
    "run.json",
    "metrics.csv",
    "selections.jsonl",
    "report.json",
    "checkpoints",
}
# What a report holds at least, whatever else it says.
FIELDS = [
    "model",
    "method",
    "device",
    "simulated",
    "enforced_by",
    "stopped_because",
    "cap_bytes",
    "runtime_bytes",
    "device_runtime_bytes",
    "training_peak_bytes",
    "device_peak_bytes",
    "predicted_peak_bytes",
    "peak_rss_bytes",
    "peak_anonymous_bytes",
    "peak_file_bytes",
    "peak_swap_bytes",
    "children_peak_bytes",
    "peak_live_bytes",
    "within_cap",
    "val_accuracy",
    "val_accuracy_before",
    "val_recall",
    "train_seconds",
    "eval_seconds",
    "total_seconds",
    "images_per_second",
    "steps",
    "flops",
    "flops_full",
    "backend",
    "seed",
    "versions",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, one of them rare; no val/."""
    return make_images(tmp_path_factory.mktemp("images"), {"ant": 20, "bee": 15, "cow": 5})


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport, Witness]:
    """One run of two epochs that many tests look at."""
    folder, witness = tmp_path_factory.mktemp("runs") / "two-epochs", Witness()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        report = finetune(images, folder, witness, steps=None, epochs=2, seed=3)
    return folder, report, witness


def stored(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return loaded


def weights(path: Path) -> dict[str, Any]:
    return {name: array.astype(np.float32) for name, array in load_file(path).items()}


def changed(folder: Path) -> set[str]:
    """The tensors, but for the classifier, in which the saved model differs from the bundled one by even a bit."""
    before, after = weights(MICRO_FOLDER / "model.safetensors"), weights(folder / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not name.startswith("head.") and before[name].tobytes() != after[name].tobytes()}


# ------------------------------------------------------------------------------------------------------ the run folder


def test_a_run_leaves_all_that_a_run_folder_holds_and_nothing_else(made: tuple[Path, RunReport, Witness]) -> None:
    folder, report, _ = made
    assert {path.name for path in folder.iterdir()} - {".lock"} == FILES
    assert (folder / "labels.txt").read_text() == "ant\nbee\ncow\n"
    assert read_report(folder) == report
    assert report.stopped_because == "finished"
    assert report.steps == 8
    assert report.epochs == 2


def test_the_report_follows_its_schema_and_knows_every_figure(made: tuple[Path, RunReport, Witness]) -> None:
    report = stored(made[0])
    Draft202012Validator(json.loads((REPOSITORY / "docs" / "report.schema.json").read_bytes())).validate(report)
    assert [name for name in FIELDS if name not in report] == []
    assert [name for name in FIELDS if report[name] is None and name != "peak_live_bytes"] == []
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"]
    assert report["simulated"] is True
    assert report["device_peak_bytes"] == report["device_runtime_bytes"] + report["training_peak_bytes"]
    assert report["within_cap"] is True
    # In a process that other tests have made large, what they leave may go meanwhile.
    assert report["peak_rss_bytes"] > 0.9 * report["runtime_bytes"]
    assert 0 < report["flops"] < report["flops_full"]
    assert report["train_seconds"] + report["eval_seconds"] < report["total_seconds"]
    assert set(report["phases"]) >= {"runtime", "data", "load", "train", "evaluate", "save"}


def test_plain_timm_loads_the_folder_and_predicts_what_the_report_says(
    made: tuple[Path, RunReport, Witness], images: Path
) -> None:
    folder, report, _ = made
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    val = open_folder(images, seed=3).val
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.open(Path(val.root, path)).convert("RGB")) for path in val.paths])
        logits = model(inputs)
    right = (logits.argmax(dim=1) == torch.tensor(val.labels)).tolist()
    assert report.val_images == len(right)
    assert report.val_accuracy == sum(right) / len(right)
    for label, name in enumerate(report.classes):
        own = [hit for hit, found in zip(right, val.labels, strict=True) if found == label]
        assert report.val_recall[name] == sum(own) / len(own)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(val.labels)).item()
    assert report.val_loss == pytest.approx(loss, abs=1e-5)
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cow"]


def test_the_saved_model_is_of_the_best_epoch(made: tuple[Path, RunReport, Witness]) -> None:
    _, report, witness = made
    accuracies = [scores.accuracy for scores in witness.evaluations]
    assert len(accuracies) == 2
    assert report.val_accuracy == max(accuracies)  # type: ignore[type-var]
    ranks = [(scores.accuracy, -(scores.loss or 0.0)) for scores in witness.evaluations]  # at a tie the lower loss
    assert report.best_epoch == 1 + ranks.index(max(ranks))


def test_the_folder_of_a_run_is_a_model_for_the_next(
    made: tuple[Path, RunReport, Witness], images: Path, tmp_path: Path
) -> None:
    folder, report, _ = made
    again = finetune(images, tmp_path / "r", model=f"local-dir:{folder}", method="head", steps=1)
    assert again.model == f"local-dir:{folder}"
    assert changed_from(folder, tmp_path / "r") == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert report.classes == again.classes


def changed_from(start: Path, end: Path) -> set[str]:
    before, after = weights(start / "model.safetensors"), weights(end / "model.safetensors")
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def test_unreadable_images_are_reported_by_a_path_relative_to_the_data(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", {"a": 10, "b": 10})
    (data / "a" / "005.png").write_bytes(b"no image")
    report = finetune(data, tmp_path / "r", max_bad=0.1, method="head", steps=1)
    assert [image.path for image in report.bad_images] == ["a/005.png"]
    assert report.train_images is not None
    assert report.val_images is not None
    assert report.train_images + report.val_images == 19
    assert str(tmp_path) not in (tmp_path / "r" / "report.json").read_text()


# ---------------------------------------------------------------------------------------------- methods and what trains


@pytest.mark.parametrize(
    ("method", "options", "trained"),
    [
        ("head", {}, ("norm.",)),
        ("last-k", {"trained_blocks": 2}, ("blocks.10.", "blocks.11.", "norm.")),
        ("alast", {"split_block": 8}, ("blocks.8.", "blocks.9.", "blocks.10.", "blocks.11.", "norm.")),
        ("random-k", {"split_block": 9, "trained_blocks": 2}, ("blocks.9.", "blocks.10.", "blocks.11.", "norm.")),
    ],
)
def test_what_a_method_freezes_stays_bit_equal_and_the_rest_moves(
    images: Path, tmp_path: Path, method: str, options: dict[str, Any], trained: tuple[str, ...]
) -> None:
    # Without the classifier first: else the start may be the best model, in which nothing has moved.
    report = finetune(images, tmp_path / "r", method=method, steps=4, head_first=False, **options)
    assert report.method == method
    moved = changed(tmp_path / "r")
    assert all(name.startswith(trained) for name in moved)
    assert moved
    assert losses(tmp_path / "r")[0] != losses(tmp_path / "r")[-1]
    assert report.flops_share is not None
    assert report.flops_share < 0.7


def test_full_fine_tuning_moves_every_parameter(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", method="full", steps=2)
    assert changed(tmp_path / "r") == {
        name for name in weights(tmp_path / "r/model.safetensors") if name[:5] != "head."
    }
    assert report.flops == report.flops_full
    assert report.tokens_share == 1


def test_momentum_and_sgd_train_too(images: Path, tmp_path: Path) -> None:
    for optimizer in ("momentum", "sgd"):
        report = finetune(images, tmp_path / optimizer, optimizer=optimizer, method="last-k", steps=2, head_first=False)
        assert report.steps == 2
        assert changed(tmp_path / optimizer)


# ------------------------------------------------------------------------------------------------------------ tiny data


def test_a_batch_larger_than_the_data_is_the_data(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", batch_size=4096, method="head", steps=2)
    assert report.batch_size == report.train_images
    assert report.epochs == 2


def test_a_batch_of_one_trains(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", batch_size=1, method="alast", steps=2)
    assert (report.batch_size, report.micro_batch, report.steps) == (1, 1, 2)


def test_two_classes_with_one_validation_image_are_enough(tmp_path: Path) -> None:
    make_images(tmp_path / "data" / "train", {"a": 3, "b": 2})
    make_images(tmp_path / "data" / "val", {"b": 1}, seed=1)
    report = finetune(tmp_path / "data", tmp_path / "r", method="head", steps=2)
    assert report.val_images == 1
    assert report.val_recall["a"] is None
    assert report.val_recall["b"] in (0.0, 1.0)
    assert any("Without images to validate on: a." in note for note in report.notes)


def test_class_weights_change_the_losses_of_unbalanced_data(images: Path, tmp_path: Path) -> None:
    finetune(images, tmp_path / "plain", method="head")
    finetune(images, tmp_path / "balanced", method="head", balanced_class_weights=True)
    assert losses(tmp_path / "plain") != losses(tmp_path / "balanced")


@pytest.mark.parametrize("option", [{"hflip": 0.5}, {"augment": True}, {"label_smoothing": 0.2}])
def test_what_changes_the_training_images_changes_losses_and_repeats(
    images: Path, tmp_path: Path, option: dict[str, Any]
) -> None:
    finetune(images, tmp_path / "plain", method="head", steps=2)
    for name in ("one", "two"):
        finetune(images, tmp_path / name, method="head", steps=2, **option)
    assert losses(tmp_path / "one") == losses(tmp_path / "two") != losses(tmp_path / "plain")


def test_another_image_size_resizes_the_model_that_timm_loads(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", image_px=48, method="last-k", steps=2)
    model = timm.create_model(f"local-dir:{tmp_path / 'r'}", pretrained=True)
    assert model.patch_embed.img_size == (48, 48)
    assert model.pos_embed.shape[1] == 12 * 12 + 1
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 48, 48)
    assert report.steps == 2


def test_an_image_size_of_one_patch_trains_and_one_that_is_no_multiple_is_refused(images: Path, tmp_path: Path) -> None:
    assert finetune(images, tmp_path / "r", image_px=4, steps=2).steps == 2
    with pytest.raises(UsageError, match="Try 48 or 52"):
        finetune(images, tmp_path / "no", image_px=50)
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------------ the same again


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_in_another_process_and_another_seed_does_not(
    images: Path, tmp_path: Path
) -> None:
    finetune(images, tmp_path / "here", seed=5)
    finetune(images, tmp_path / "other", seed=6)
    flags = ["--device", "jetson-nano", "--steps", "3", "-b", "8", "--threads", "1", "--seed", "5"]
    done = cli("finetune", "--data", images, "--model", "edgetune_micro", *flags, "--output", tmp_path / "there", "-q")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "there") == losses(tmp_path / "here") != losses(tmp_path / "other")
    assert (tmp_path / "there/model.safetensors").read_bytes() == (tmp_path / "here/model.safetensors").read_bytes()


def test_a_replayed_plan_gives_the_same_losses_whatever_else_was_asked_for(images: Path, tmp_path: Path) -> None:
    finetune(images, tmp_path / "one", method="random-k", optimizer="momentum", batch_size=6)
    finetune(images, tmp_path / "two", plan_file=tmp_path / "one" / "plan.json", device="raspberry-pi-5-8gb")
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    one, two = (read_plan(tmp_path / name / "plan.json") for name in ("one", "two"))
    # What is done is the plan's; the cap it is held against, and the runtime, are the new device's.
    assert two.cap_bytes == find_device("raspberry-pi-5-8gb").usable_ram_bytes != one.cap_bytes
    assert two.runtime_bytes != one.runtime_bytes
    assert replayed(one, cap_bytes=two.cap_bytes, runtime_bytes=two.runtime_bytes) == two


def test_a_plan_of_another_model_or_image_size_is_refused(
    made: tuple[Path, RunReport, Witness], images: Path, tmp_path: Path
) -> None:
    for wrong in ({"image_px": 48}, {"model": "deit_tiny_patch16_224"}):
        with pytest.raises(UsageError, match="the plan is for"):
            finetune(images, tmp_path / "r", plan_file=made[0] / "plan.json", **wrong)
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "sideways"},
        {"micro_batch": 0},
        {"batch_size": -1},
        {"evaluation_batch": 0},
        {"threads": 0},
        {"token_ceiling": []},
        {"token_ceiling": [1, 64]},
        {"token_floor": float("1e-9")},
        {"split_block": 99},
        {"trained_blocks": 13},
        {"cap_bytes": 0},
        {"format_version": 99},
        {"draws": False},
        {"embeddings_train": True, "split_block": 8},  # what is below it never trains
        {"ever_trained_blocks": 0},
        {"accumulation": 99},
        {"predicted_peak_bytes": -5},
        {"optimizer": "lion"},
        {"surprise": 1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_plan_that_no_run_could_follow_is_refused_by_name(
    made: tuple[Path, RunReport, Witness], tmp_path: Path, wrong: dict[str, Any]
) -> None:
    plan = json.loads((made[0] / "plan.json").read_bytes()) | wrong
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunFolderError, match=next(iter(wrong))):
        finetune(None, tmp_path / "r", plan_file=tmp_path / "plan.json")
    assert not (tmp_path / "r").exists()


# -------------------------------------------------------------------------------------------------------- the cap


@pytest.mark.parametrize("existed", [False, True])
def test_what_does_not_fit_says_what_would_and_leaves_no_folder(images: Path, tmp_path: Path, existed: bool) -> None:
    output = tmp_path / "r"
    if existed:
        output.mkdir()
    with pytest.raises(DoesNotFit, match="needs at least") as caught:
        finetune(images, output, ram_cap_bytes=320 * MIB, method="full")
    assert caught.value.smallest_cap_bytes > 320 * MIB
    assert "--method head" in str(caught.value) or "--ram-cap" in str(caught.value)
    if existed:
        assert list(output.iterdir()) == []
    else:
        assert not output.exists()


@pytest.mark.slow
def test_the_smallest_cap_of_the_error_works_and_holds(images: Path, tmp_path: Path) -> None:
    wanted = ["finetune", "--data", str(images), "--model", "edgetune_micro", "--device", "jetson-nano", "--json"]
    wanted += ["--steps", "3", "-b", "8", "--threads", "1", "--output", str(tmp_path / "r")]
    refused = cli(*wanted, "--ram-cap", "320MiB")
    assert refused.returncode == 3
    smallest = refused.stderr.split("--ram-cap ")[1].split()[0].rstrip(".,")
    done = cli(*wanted, "--ram-cap", smallest)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["within_cap"] is True
    assert report["device_peak_bytes"] <= report["cap_bytes"]


def test_a_device_that_states_no_torch_runtime_works_with_a_note(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", device="iphone-15-pro", method="head", steps=1)
    assert any("iphone-15-pro states no runtime for torch" in note for note in report.notes)
    assert report.simulated


def test_this_machine_is_judged_as_it_is(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", device="auto", method="head", steps=1)
    assert report.device == devices.AUTO
    assert not report.simulated
    assert report.device_peak_bytes is not None
    assert report.peak_rss_bytes is not None
    assert report.device_peak_bytes >= report.peak_rss_bytes


def test_random_weights_that_stay_frozen_are_warned_of(images: Path, tmp_path: Path) -> None:
    report = finetune(images, tmp_path / "r", pretrained=False, method="head", steps=1)
    assert any("frozen at random weights" in note for note in report.notes)
    report = finetune(images, tmp_path / "full", pretrained=False, method="full", steps=1)
    assert not any("random weights" in note for note in report.notes)


# --------------------------------------------------------------------------------------------- what can't be used


@pytest.mark.parametrize("existed", [False, True])
def test_bad_data_leaves_no_folder(tmp_path: Path, existed: bool) -> None:
    output = tmp_path / "r"
    if existed:
        output.mkdir()
    data = make_images(tmp_path / "one-class", {"only": 5})
    with pytest.raises(DataError, match="only one class folder"):
        finetune(data, output)
    assert output.exists() is existed
    assert not existed or list(output.iterdir()) == []


def test_bad_weights_leave_no_folder(images: Path, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(WeightsError, match="missing"):
        finetune(images, tmp_path / "r", weights=str(tmp_path / "w.safetensors"))
    assert not (tmp_path / "r").exists()


def test_a_folder_with_anything_in_it_is_never_written_to(images: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        finetune(images, tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": 0.0},
        {"batch_size": 0},
        {"val_share": 1.0},
        {"seed": -1},
        {"label_smoothing": 1.0},
        {"method": "sideways"},
        {"weights": "some.safetensors", "pretrained": False},
        {"data": "caf\udce9"},
        {"trained_blocks": 13},
        {"split_block": 12},
        {"accumulation": 9},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    images: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    wanted = msgspec.structs.replace(settings(images), **wrong)
    with pytest.raises(UsageError, match="--"):
        run.finetune(wanted, output=tmp_path / "r", listener=Witness())
    assert not (tmp_path / "r").exists()


# What a run says that an image which has gone ended: what was being done, and two whole sentences.
SENTENCES = r"^{} stopped {}: \S+\.png: No such file or directory\. When that is mended, go on with: edgetune finetune --resume "


@pytest.mark.parametrize(
    ("doing", "changes"),
    [
        ("caching the frozen blocks", {"epochs": 3, "method": "last-k", "split_block": 8}),
        ("fitting the classifier", {"epochs": 8, "method": "alast", "split": "lowest", "prefix_cache": False}),
        ("evaluation", {"epochs": 3, "method": "full", "prefix_cache": False}),
    ],
)
def test_an_image_that_goes_away_before_the_first_step_ends_the_run_with_what_was_being_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str, changes: dict[str, Any]
) -> None:
    from edgetune import session

    data = make_images(tmp_path / "data", {"a": 12, "b": 12})
    begin = session.begin

    def taken_away(*args: Any) -> None:
        data.rename(tmp_path / "moved")
        begin(*args)

    with monkeypatch.context() as patch:
        patch.setattr(session, "begin", taken_away)
        # A limit on the disk keeps decoded images off it.
        with pytest.raises(DataError, match=SENTENCES.format(doing, "before the first step")):
            finetune(data, tmp_path / "r", Witness(), steps=None, cache_limit_bytes=10**9, **changes)
    (tmp_path / "moved").rename(data)
    assert run.resume(tmp_path / "r", listener=Witness()).stopped_because == "finished"


def test_an_image_that_goes_away_in_mid_run_ends_it_with_a_folder_that_can_be_resumed(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", {"a": 12, "b": 12})
    moved = tmp_path / "moved"

    def take_away(event: Any) -> None:
        if event.step == 2:
            data.rename(moved)

    # With --no-cache nothing but the weights is kept on disk: every epoch opens the images.
    with pytest.raises(DataError, match=SENTENCES.format("training", "after step [2-5]")):
        finetune(data, tmp_path / "r", Witness(take_away), steps=6, batch_size=4, prefix_cache=False)
    report = read_report(tmp_path / "r")
    assert report.stopped_because == "failed"
    assert report.steps is not None
    assert 2 <= report.steps < 6
    moved.rename(data)
    resumed = run.resume(tmp_path / "r", listener=Witness())
    assert resumed.steps == 6
    finetune(data, tmp_path / "whole", steps=6, batch_size=4)
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


def test_images_that_were_decoded_and_kept_may_go_away(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", {"a": 12, "b": 12})

    def take_away(event: Any) -> None:
        if event.step == 1:
            data.rename(tmp_path / "moved")

    report = finetune(data, tmp_path / "r", Witness(take_away), steps=6, batch_size=4)
    assert (report.stopped_because, report.steps) == ("finished", 6)


def test_a_diverging_run_says_so_and_that_its_weights_are_of_no_use(images: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=r"Try a lower --lr .* of no use"):
        finetune(images, tmp_path / "r", method="full", optimizer="sgd", learning_rate=100.0, batch_size=2, steps=30)
    report = read_report(tmp_path / "r")
    assert report.stopped_because == "diverged"
    assert report.val_accuracy is None


# ----------------------------------------------------------------------------------------------------- an integrated GPU


class _IntegratedGpu:
    """As `torch.cuda` on a board: what was reserved there is in no figure of the process."""

    def __init__(self, reserved_bytes: int) -> None:
        self._reserved = reserved_bytes

    def device_count(self) -> int:
        return 1

    def reset_peak_memory_stats(self, _index: int) -> None: ...

    def max_memory_reserved(self, _index: int) -> int:
        return self._reserved


@pytest.mark.parametrize(("device", "counted"), [("jetson-nano", True), ("raspberry-pi-4-4gb", False)])
def test_what_an_integrated_gpu_was_given_counts_against_the_cap(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, counted: bool
) -> None:
    plain = finetune(images, tmp_path / "plain", device=device)
    monkeypatch.setattr(memory, "_cuda", lambda: _IntegratedGpu(plain.cap_bytes - plain.device_peak_bytes // 2))
    if not counted:
        report = finetune(images, tmp_path / "run", device=device)
        assert report.within_cap
        return
    with pytest.raises(CapExceeded):
        finetune(images, tmp_path / "run", device=device)
    report = read_report(tmp_path / "run")
    assert not report.within_cap
    assert (report.stopped_because, report.steps) == ("over the cap", 1)
    assert report.device_peak_bytes > report.cap_bytes
    assert (tmp_path / "run" / "model.safetensors").is_file()
