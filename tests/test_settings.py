"""What was asked for makes sense, or is refused by the flag's name; and it is stored and read back as it was."""

from __future__ import annotations

import msgspec
import pytest

from edgetune.alast import AlastSettings
from edgetune.errors import UsageError
from edgetune.settings import RunSettings, check

GOOD = RunSettings(model="deit_tiny_patch16_224")


def test_the_defaults_make_sense() -> None:
    check(GOOD)


@pytest.mark.parametrize(
    ("field", "flag", "edges", "outside"),
    [
        ("epochs", "--epochs", [1, 100_000], [0, -1]),
        ("steps", "--steps", [1, None], [0]),
        ("batch_size", "--batch-size", [1, 65_536], [0, 65_537]),
        ("learning_rate", "--lr", [1e-9, 100.0, None], [0.0, -1e-3, 101.0]),
        ("weight_decay", "--weight-decay", [0.0, 10.0], [-0.1]),
        ("warmup_epochs", "--warmup-epochs", [0.0], [-1.0]),
        ("label_smoothing", "--smoothing", [0.0, 0.999], [-0.1, 1.0]),
        ("hflip", "--hflip", [0.0, 1.0], [-0.1, 1.1]),
        ("max_bad", "--max-bad", [0.0, 1.0], [-0.1, 1.1]),
        ("val_share", "--val-share", [0.01, 0.9], [0.0, 1.0]),
        ("checkpoint_every", "--checkpoint-every", [1, None], [0]),
        ("image_px", "--image-size", [1, 4096, None], [0, 4097]),
        ("seed", "--seed", [0, 2**63 - 1], [-1, 2**63]),
        ("threads", "--threads", [1, None], [0]),
        ("token_floor", "--token-floor", [0.01, 1.0, None], [0.0, 1.01]),
    ],
)
def test_numbers_are_checked_by_their_flags_names(
    field: str, flag: str, edges: list[float | None], outside: list[float]
) -> None:
    for value in edges:
        check(msgspec.structs.replace(GOOD, **{field: value}))
    broken = [*outside, *([float("nan"), float("inf")] if isinstance(outside[0], float) else [])]
    for value in broken:
        with pytest.raises(UsageError, match=flag):
            check(msgspec.structs.replace(GOOD, **{field: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_score": "norm"}, "--token-score must be attention or distance"),
        ({"token_score": "distance", "method": "full"}, "--method full drops no tokens"),
        ({"token_score": "distance", "backend": "ort", "artifacts": "there"}, "artifacts drop tokens by attention"),
    ],
)
def test_a_score_is_refused_where_nothing_goes_by_it(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check(msgspec.structs.replace(GOOD, **changes))


@pytest.mark.parametrize(
    ("alast", "flag"),
    [
        (AlastSettings(initial_budget=0.0), "--initial-budget"),
        (AlastSettings(initial_budget=1.5), "--initial-budget"),
        (AlastSettings(alpha=-1.0), "--alpha"),
        (AlastSettings(alpha=float("nan")), "--alpha"),
    ],
)
def test_alasts_numbers_are_checked_too(alast: AlastSettings, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        check(msgspec.structs.replace(GOOD, alast=alast))


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(UsageError, match=r"one of full, head, last-k, random-k, alast, not 'lora'"):
        check(msgspec.structs.replace(GOOD, method="lora"))
    with pytest.raises(UsageError, match="--weights and --no-pretrained"):
        check(msgspec.structs.replace(GOOD, weights="w.safetensors", pretrained=False))


@pytest.mark.parametrize("field", ["model", "weights", "data", "device"])
def test_a_path_that_json_cannot_hold_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match=f"--{field} .* is not UTF-8"):
        check(msgspec.structs.replace(GOOD, **{field: "caf\udce9"}))


def test_settings_survive_json_and_unknown_ones_are_refused() -> None:
    settings = msgspec.structs.replace(
        GOOD, learning_rate=1 / 3, seed=2**63 - 1, alast=AlastSettings(alpha=0.1, layer_choice="top")
    )
    stored = msgspec.json.encode(settings)
    assert msgspec.json.decode(stored, type=RunSettings) == settings
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(stored[:-1] + b',"nonsense":1}', type=RunSettings)


@pytest.mark.parametrize("wrong", [{"token_floor": 0.5}, {"alast": AlastSettings(alpha=3.0)}])
def test_what_only_alast_understands_is_refused_with_other_methods(wrong: dict[str, object]) -> None:
    check(msgspec.structs.replace(GOOD, **wrong))
    with pytest.raises(UsageError, match="--method alast"):
        check(msgspec.structs.replace(GOOD, method="full", **wrong))
