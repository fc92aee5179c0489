"""report.json says everything, always as valid JSON, and is read back as it was."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

from edgetune.data import BadImage
from edgetune.errors import RunFolderError
from edgetune.report import RunReport, read_report, report_schema, report_to_json

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())
PROMISED = {
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
}


def smallest() -> RunReport:
    """What is known of a run that ended before it began."""
    return RunReport(
        model="m", method="full", device="d", simulated=False, backend="ort", seed=1, stopped_because="interrupted"
    )


def validate(data: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    jsonschema.validate(value, SCHEMA)
    return value


def test_the_schema_in_docs_is_what_the_code_says(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_schema", ROOT / "tools" / "make_schema.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(["--output", str(tmp_path)])
    assert json.loads((tmp_path / "report.schema.json").read_text()) == SCHEMA == report_schema(), (
        "run tools/make_schema.py"
    )
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_promised_field_is_in_every_report(report: RunReport) -> None:
    for each in (report, smallest()):
        value = validate(report_to_json(each))
        assert value.keys() >= PROMISED
        assert list(value) == [field.name for field in msgspec.structs.fields(RunReport)]


def test_the_schema_explains_every_field_and_its_unit() -> None:
    for name, field in SCHEMA["$defs"]["RunReport"]["properties"].items():
        assert field["description"], name
        if name.endswith("_bytes") or name in ("phases", "predicted_phases"):
            assert field["description"].endswith("bytes"), name


@pytest.mark.parametrize(
    "change",
    [
        {"cap_bytes": -1},
        {"steps": 1.5},
        {"within_cap": "yes"},
        {"unknown": 1},
        {"val_recall": {"a": "b"}},
        {"seed": None},
    ],
)
def test_the_schema_and_the_reader_refuse_the_same_things(
    report: RunReport, tmp_path: Path, change: dict[str, Any]
) -> None:
    value = json.loads(report_to_json(report)) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, SCHEMA)
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(RunFolderError, match="no report of a run"):
        read_report(tmp_path)


def test_a_report_is_read_back_as_it_was(report: RunReport, tmp_path: Path) -> None:
    for each in (report, smallest()):
        file = tmp_path / "report.json"
        file.write_bytes(report_to_json(each))
        assert read_report(file) == read_report(tmp_path) == each
        assert report_to_json(read_report(file)) == file.read_bytes()


def test_what_is_no_number_becomes_null_everywhere(report: RunReport, tmp_path: Path) -> None:
    floats = [
        field.name for field in msgspec.structs.fields(RunReport) if isinstance(getattr(report, field.name), float)
    ]
    assert len(floats) > 10
    for bad in (math.nan, math.inf, -math.inf, np.float32("nan")):
        broken = msgspec.structs.replace(report, **dict.fromkeys(floats, bad), val_recall={"ant": bad, "bee": 0.5})
        value = validate(report_to_json(broken))
        assert [value[name] for name in floats] == [None] * len(floats)
        assert value["val_recall"] == {"ant": None, "bee": 0.5}
        (tmp_path / "report.json").write_bytes(report_to_json(broken))
        assert read_report(tmp_path).val_accuracy is None


def test_numpys_numbers_are_numbers(report: RunReport) -> None:
    changed: Any = {"val_accuracy": np.float32(0.5), "steps": np.int64(7), "val_loss": np.float64(0.25)}
    value = validate(report_to_json(msgspec.structs.replace(report, **changed, within_cap=np.bool_(True))))
    assert (value["val_accuracy"], value["steps"], value["val_loss"], value["within_cap"]) == (0.5, 7, 0.25, True)


def test_names_that_are_not_utf_8_can_be_written(report: RunReport, tmp_path: Path) -> None:
    name = "caf\udce9"  # a Latin-1 folder's name, as Python hands it over
    odd = msgspec.structs.replace(
        report, classes=(name,), val_recall={name: 1.0}, bad_images=(BadImage(f"{name}/\n.png", "é\0"),)
    )
    value = validate(report_to_json(odd))
    assert value["classes"] == list(value["val_recall"]) == ["caf\\udce9"]
    assert value["bad_images"] == [{"path": "caf\\udce9/\n.png", "reason": "é\0"}]
    (tmp_path / "report.json").write_bytes(report_to_json(odd))
    assert read_report(tmp_path).classes == ("caf\\udce9",)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"format_version": 1}', b"\0" * 4096]
)
def test_what_is_no_report_is_a_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "report.json").write_bytes(data)
    with pytest.raises(RunFolderError, match=r"report\.json is no report of a run"):
        read_report(tmp_path)


def test_a_missing_report_and_one_of_another_format_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="can't be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"format_version": 9, "new": []}')
    with pytest.raises(RunFolderError, match="format 9; this edgetune reads format 1"):
        read_report(tmp_path)
