"""Names, weights and configs: what is named gets loaded or refused in words, and timm loads back what was saved."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import timm
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from edgetune.errors import EdgetuneError, UnknownModel, UnsupportedModel, UsageError, WeightsError
from edgetune.vit.models import (
    MICRO_FOLDER,
    MICRO_MODEL,
    LoadedModel,
    ModelSource,
    describe,
    known_names,
    load_model,
    timm_config,
)

CLASSES = 4
TINY = "test_vit"  # timm's own model for tests: 64 wide, 6 deep, 160 px


def _load(name: str = TINY, *, pretrained: bool = False, classes: int = CLASSES, **options: Any) -> LoadedModel:
    return load_model(ModelSource(name=name, pretrained=pretrained, **options), classes)


def _random_state(name: str = TINY, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(11)
    model = timm.create_model(name, num_classes=7, **changes)
    return {key: torch.randn_like(value) * 0.05 for key, value in model.state_dict().items()}


def _without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head")}


def _assert_holds(model: VisionTransformer, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert set(_without_head(own)) == set(_without_head(state))
    for name, value in _without_head(state).items():
        assert torch.equal(own[name], value.float()), name


# --- names ---


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("deit_tiny_patch16_244", "deit_tiny_patch16_224"),
        ("deit_tinny", "deit_tiny"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("edgetune_mikro", MICRO_MODEL),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    for ask in (lambda: _load(name), lambda: describe(ModelSource(name=name), CLASSES)):
        with pytest.raises(UnknownModel, match="Did you mean") as refused:
            ask()
        assert nearest in str(refused.value)
        assert repr(name) in str(refused.value)


@pytest.mark.parametrize("name", ["", "qqqqqq", "../../etc/passwd", "deit\n", "-", "local-dir:", "local-dir:/nowhere"])
def test_any_nonsense_gets_an_unknown_model(name: str) -> None:
    with pytest.raises(UnknownModel):
        _load(name)


def test_a_wrong_tag_gets_the_right_ones() -> None:
    with pytest.raises(UnknownModel, match=r"test_vit\.r160_in1k"):
        _load("test_vit.r160")
    assert _load("test_vit.r160_in1k").architecture == "test_vit"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("resnet18", "ResNet"), ("test_convnext", "ConvNeXt"), ("eva02_tiny_patch14_224", "Eva"), ("levit_128s", "Levit")],
)
def test_another_family_is_refused_by_name_without_building_it(name: str, kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"{name} is a {kind}.*deit_tiny_patch16_224"):
        describe(ModelSource(name=name), CLASSES)


def test_every_name_offered_is_known() -> None:
    names = known_names()
    assert names[0] == MICRO_MODEL
    assert len(names) > 150
    assert all(timm.is_model(name) for name in names[1:])


# --- image sizes ---


@pytest.mark.parametrize(("image_px", "tries"), [(1, "Try 16."), (100, "Try 96 or 112."), (161, "Try 160 or 176.")])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused_with_the_next(image_px: int, tries: str) -> None:
    for ask in (
        lambda: _load(image_px=image_px),
        lambda: describe(ModelSource(name=TINY, image_px=image_px), CLASSES),
    ):
        with pytest.raises(UsageError) as refused:
            ask()
        assert tries in str(refused.value)


def test_the_position_embedding_is_resized_as_timm_does(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(_random_state(), path)
    loaded = _load(weights=str(path), image_px=96)
    theirs = timm.create_model(
        TINY, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=7, img_size=96
    )
    assert loaded.model.pos_embed.shape == (1, 37, 64)
    assert torch.equal(loaded.model.pos_embed, theirs.pos_embed)
    assert (loaded.preprocess.height_px, loaded.preprocess.width_px) == (96, 96)


# --- what is built ---


def test_the_head_is_for_the_datas_classes_and_nothing_else_changes() -> None:
    loaded = _load(classes=9)
    assert loaded.model(torch.zeros(1, 3, 160, 160)).shape == (1, 9)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert list(loaded.model.state_dict()) == list(timm.create_model(TINY, num_classes=9).state_dict())


@pytest.mark.parametrize(
    ("name", "image_px"),
    [
        (TINY, None),
        (TINY, 96),
        (MICRO_MODEL, None),
        ("deit_tiny_distilled_patch16_224", 64),
        ("vit_tiny_r_s16_p8_224", 64),
    ],
)
def test_a_model_is_described_without_memory_as_it_would_be_loaded(name: str, image_px: int | None) -> None:
    from edgetune.vit.shape import shape_of

    shape, preprocess = describe(ModelSource(name=name, image_px=image_px), CLASSES)
    loaded = _load(name, image_px=image_px)
    assert shape == shape_of(loaded.model, name)
    assert preprocess == loaded.preprocess


def test_the_bundled_model_is_loaded_from_its_folder_and_keeps_its_values() -> None:
    from safetensors.torch import load_file

    loaded = _load(MICRO_MODEL, pretrained=True)
    _assert_holds(loaded.model, load_file(MICRO_FOLDER / "model.safetensors"))
    assert loaded.model.pos_embed.dtype is torch.float32
    assert loaded.model_args["depth"] == 12
    unpretrained = _load(MICRO_MODEL, pretrained=False)
    assert not torch.equal(unpretrained.model.pos_embed, loaded.model.pos_embed)


# --- weights ---


def _save_wrapped(key: str) -> Callable[[dict[str, Tensor], Path], None]:
    return lambda state, path: torch.save({key: state, "epoch": 3}, path)


WRITERS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "safetensors": (".safetensors", lambda state, path: save_file(state, path)),
    "pth": (".pth", torch.save),
    "bin": (".bin", torch.save),
    "in state_dict": (".pth", _save_wrapped("state_dict")),
    "in model": (".pth.tar", _save_wrapped("model")),
    "of an average": (".pth", lambda state, path: torch.save({"model": {}, "model_ema": state}, path)),
    "of a parallel model": (".pth", lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path)),
    "in half": (".safetensors", lambda state, path: save_file({k: v.half() for k, v in state.items()}, path)),
    "in bfloat16": (".pth", lambda state, path: torch.save({k: v.bfloat16() for k, v in state.items()}, path)),
    "without a head": (".safetensors", lambda state, path: save_file(_without_head(state), path)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_weights_are_loaded_but_for_the_classifier(kind: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[kind]
    state = _random_state()
    write(state, tmp_path / f"weights{suffix}")
    torch.manual_seed(3)
    loaded = _load(weights=str(tmp_path / f"weights{suffix}"))
    if kind == "in half":
        state = {name: value.half() for name, value in state.items()}
    elif kind == "in bfloat16":
        state = {name: value.bfloat16() for name, value in state.items()}
    _assert_holds(loaded.model, state)
    assert loaded.model.head.weight.shape == (CLASSES, 64)
    assert loaded.model.norm.weight.dtype is torch.float32
    # What was loaded is the run's own: nothing maps the file.
    (tmp_path / f"weights{suffix}").unlink()
    loaded.model(torch.zeros(1, 3, 160, 160))


def test_deit3s_own_names_for_layer_scale_are_known(tmp_path: Path) -> None:
    name, reduced = "deit3_small_patch16_224", {"depth": 1, "img_size": 32}
    state = _random_state(name, **reduced)
    assert any(".ls1.gamma" in key for key in state)
    renamed = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in state.items()}
    path = _model_folder(tmp_path, architecture=name, model_args=reduced)
    torch.save({"model": renamed}, path / "theirs.pth")
    loaded = _load(f"local-dir:{path}", weights=str(path / "theirs.pth"))
    _assert_holds(loaded.model, state)


def test_dinov2s_own_names_for_registers_are_known(tmp_path: Path) -> None:
    name, reduced = "vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 28}
    state = _random_state(name, **reduced)
    theirs = dict(state)
    theirs["register_tokens"] = theirs.pop("reg_token")
    # DINOv2's position embedding has a place for the class token; timm adds it to the token.
    place = torch.full((1, 1, 384), 0.5)
    theirs["pos_embed"] = torch.cat((place, state["pos_embed"]), dim=1)
    theirs["cls_token"] = state["cls_token"] - place
    theirs["mask_token"] = torch.zeros(1, 384)
    path = _model_folder(tmp_path, architecture=name, model_args=reduced)
    torch.save(theirs, path / "theirs.pth")
    loaded = _load(f"local-dir:{path}", weights=str(path / "theirs.pth"))
    state["cls_token"] = theirs["cls_token"] + place
    _assert_holds(loaded.model, state)


def _broken(kind: str, state: dict[Any, Any]) -> tuple[dict[Any, Any], str]:
    """A state with one fault of a kind, and what the refusal must say of it."""
    if kind == "missing":
        del state["blocks.2.attn.qkv.weight"]
        return state, "1 missing (blocks.2.attn.qkv.weight)"
    if kind == "many missing":
        return {key: value for key, value in state.items() if not key.startswith("blocks.")}, "72 missing (blocks.0."
    if kind == "unexpected":
        state["decoder.weight"] = torch.zeros(2)
        return state, "1 unexpected (decoder.weight)"
    if kind == "another shape":
        state["norm.weight"] = torch.zeros(65)
        return state, "norm.weight (65,) for (64,)"
    if kind in ("nan", "inf"):
        state["blocks.3.mlp.fc1.bias"][5] = float(kind)
        return state, "1 not finite numbers (blocks.3.mlp.fc1.bias)"
    if kind == "nan in half":
        state = {key: value.half() for key, value in state.items()}
        state["pos_embed"][0, 0, 0] = float("nan")
        return state, "1 not finite numbers (pos_embed)"
    if kind == "integers":
        state["norm.bias"] = torch.zeros(64, dtype=torch.int32)
        return state, "norm.bias"
    if kind == "sparse":
        state["norm.bias"] = torch.zeros(64).to_sparse()
        return state, "weights.pth"  # refused on loading or after, as torch's version has it
    if kind == "no tensor":
        state["norm.bias"] = 5
        return state, "norm.bias"
    if kind == "numbers as names":
        state[7] = torch.zeros(1)
        return state, "names that are no text (7)"
    return {}, "missing"


@pytest.mark.parametrize(
    "kind",
    ["missing", "many missing", "unexpected", "another shape", "nan", "inf", "nan in half", "integers", "sparse",
     "no tensor", "numbers as names", "empty"],
)  # fmt: skip
def test_what_does_not_fit_is_listed(kind: str, tmp_path: Path) -> None:
    state, said = _broken(kind, _random_state())
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(WeightsError) as refused:
        _load(weights=str(tmp_path / "weights.pth"))
    assert said in str(refused.value)
    assert "weights.pth" in str(refused.value)
    assert len(str(refused.value)) < 700


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch.save", "plain pickle"])
def test_a_pickle_with_a_payload_is_refused_and_not_executed(protocol: str, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "weights.pth"
    state = {**_random_state(), "optimizer": _Payload(ran)}
    if protocol == "torch.save":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"optimizer": _Payload(ran)}))
    with pytest.raises(WeightsError, match="never unpickles code"):
        _load(weights=str(path))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".safetensors", b""), (".safetensors", b"\xff" * 64), (".safetensors", b"\x08\0\0\0\0\0\0\0{}      "), (".pth", b""),
     (".pth", b"PK\x03\x04 broken"), (".pth", b"not a file of tensors"), (".onnx", b"\x08\x07"), ("", b"x")],
)  # fmt: skip
def test_a_broken_file_is_refused_in_words(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="weights"):
        _load(weights=str(path))


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), "text"])
def test_a_file_of_something_else_is_refused(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="not a dictionary of tensors"):
        _load(weights=str(tmp_path / "weights.pth"))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for name, write in (("a.safetensors", lambda path: save_file(_random_state(), path)),
                        ("b.pth", lambda path: torch.save(_random_state(), path))):  # fmt: skip
        path = tmp_path / name
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(WeightsError, match=name):
            _load(weights=str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(WeightsError, match="no weights file at"):
            _load(weights=str(path))


# --- the hub ---


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every connection fails at once; the addresses that were tried."""
    tried: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], *_args: Any, **_options: Any) -> socket.socket:
        tried.append(address)
        raise OSError("no network in tests")

    def connect(_self: socket.socket, address: Any) -> None:
        refuse(address)

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


def test_without_a_network_the_hubs_weights_are_an_error_that_names_the_two_ways_out(
    no_network: list[tuple[str, int]],
) -> None:
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    with pytest.raises(WeightsError) as refused:
        _load(TINY, pretrained=True)
    assert "--weights FILE.safetensors" in str(refused.value)
    assert "--no-pretrained" in str(refused.value)
    assert no_network
    assert before == hub.HF_HUB_OFFLINE


def test_a_hub_name_without_a_network_is_told_apart_from_a_model_that_cannot_be_trained(
    no_network: list[tuple[str, int]],
) -> None:
    name = "hf-hub:nobody/nothing"
    with pytest.raises(UnknownModel, match="Connect to the network"):
        describe(ModelSource(name=name), CLASSES)
    with pytest.raises(UnknownModel, match="Connect to the network"):
        _load(name, pretrained=False)
    with pytest.raises(EdgetuneError, match="hub"):
        _load(name, pretrained=True)
    assert no_network


def test_local_weights_touch_no_network(no_network: list[tuple[str, int]], tmp_path: Path) -> None:
    save_file(_random_state(), tmp_path / "weights.safetensors")
    _load(TINY, pretrained=True, weights=str(tmp_path / "weights.safetensors"))
    _load(TINY, pretrained=False)
    _load(MICRO_MODEL, pretrained=True)
    describe(ModelSource(name=TINY, pretrained=True), CLASSES)
    assert not no_network


# --- folders ---


def _model_folder(root: Path, **config: Any) -> Path:
    folder = root / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {}, **config}))
    return folder


HOSTILE: dict[str, str] = {
    "no JSON": "{",
    "no text": "\xff",
    "deep": "[" * 100_000,
    "a list": "[1]",
    "no architecture": "{}",
    "a number for a name": '{"architecture": 1}',
    "an unknown name": '{"architecture": "nope"}',
    "a path": '{"architecture": "../x"}',
    "another family": '{"architecture": "resnet18", "pretrained_cfg": {}}',
    "arguments in a list": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": [1]}',
    "arguments as text": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": "x"}',
    "null arguments": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": null}',
    "no blocks": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"depth": 0}}',
    "uneven heads": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"num_heads": 7}}',
    "grey": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"in_chans": 1}}',
    "no patch": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"patch_size": 0}}',
    "an unknown argument": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"nonsense": 1}}',
    "pretrained twice": '{"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"pretrained": true}}',
    "a list for a config": '{"architecture": "test_vit", "pretrained_cfg": [1]}',
    "mean as text": '{"architecture": "test_vit", "pretrained_cfg": {"mean": "x"}}',
    "two means": '{"architecture": "test_vit", "pretrained_cfg": {"mean": [1, 2]}}',
    "no deviation": '{"architecture": "test_vit", "pretrained_cfg": {"std": [0, 0, 0]}}',
    "a word for a share": '{"architecture": "test_vit", "pretrained_cfg": {"crop_pct": "a"}}',
    "an unknown interpolation": '{"architecture": "test_vit", "pretrained_cfg": {"interpolation": 7}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_config_is_an_error_in_words(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(HOSTILE[kind].encode("latin-1"))
    name = f"local-dir:{tmp_path}"
    for ask in (lambda: _load(name), lambda: describe(ModelSource(name=name), CLASSES)):
        with pytest.raises(EdgetuneError) as refused:
            ask()
        assert len(str(refused.value)) > 20


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = _model_folder(tmp_path, architecture=TINY)
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        _load(f"local-dir:{folder}", pretrained=True)


def test_the_classes_asked_for_win_over_the_configs(tmp_path: Path) -> None:
    folder = _model_folder(tmp_path, architecture=TINY, num_classes=77, model_args={"num_classes": 77})
    assert _load(f"local-dir:{folder}").model.num_classes == CLASSES


# --- what timm loads back ---


@pytest.mark.parametrize(
    ("name", "classes", "image_px"),
    [
        (TINY, CLASSES, None),
        (TINY, CLASSES + 1, 96),
        (TINY, 1, 32),
        (MICRO_MODEL, 3, None),
        (MICRO_MODEL, 2, 48),
        ("test_vit2", CLASSES, None),
        ("test_vit3", CLASSES, None),
        ("deit_tiny_distilled_patch16_224", CLASSES, 64),
        ("vit_tiny_r_s16_p8_224", CLASSES, 64),
    ],
)
def test_a_saved_model_is_loaded_back_by_plain_timm(
    name: str, classes: int, image_px: int | None, tmp_path: Path
) -> None:
    loaded = _load(name, classes=classes, image_px=image_px)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    labels = tuple(f"class {number}" for number in range(classes))
    save_file(loaded.model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(timm_config(loaded, labels)))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, loaded.preprocess.height_px, loaded.preprocess.width_px)
    with torch.no_grad():
        assert torch.equal(theirs(images), loaded.model.eval()(images))
    data = resolve_model_data_config(theirs)
    assert data["input_size"] == (3, loaded.preprocess.height_px, loaded.preprocess.width_px)
    assert (tuple(data["mean"]), tuple(data["std"])) == (loaded.preprocess.mean, loaded.preprocess.std)
    assert (data["interpolation"], data["crop_pct"], data["crop_mode"]) == (
        loaded.preprocess.interpolation, loaded.preprocess.crop_pct, loaded.preprocess.crop_mode,
    )  # fmt: skip
    # And edgetune itself, to train it further for other classes.
    again = _load(f"local-dir:{tmp_path}", pretrained=True, classes=classes + 2)
    assert again.preprocess == loaded.preprocess
    assert torch.equal(again.model.pos_embed, loaded.model.pos_embed)
    assert again.model.num_classes == classes + 2
