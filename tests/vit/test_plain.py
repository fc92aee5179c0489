"""The Vision Transformer of our own is timm's to the last bit, for every model that is built of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

import msgspec
import timm
from shapes import settled
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from edgetune.errors import BackendUnavailable, UnknownModel
from edgetune.shapes import known_shape
from edgetune.vit import known, stock
from edgetune.vit.known import described, known_models, known_tags
from edgetune.vit.layouts import as_the_models
from edgetune.vit.models import ModelSource, build_meta, describe, load_model, preprocess_of
from edgetune.vit.plain import Architecture, VisionTransformer, build
from edgetune.vit.shape import shape_of

CLASSES = 5
# One of each kind of head, prefix, norm, activation and position embedding.
KINDS = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch32_clip_224",
    "vit_base_patch32_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_medium_patch16_gap_240",
    "vit_wee_patch16_reg1_gap_256",
)


def _fresh(name: str) -> tuple[VisionTransformer, TimmVisionTransformer]:
    """A model of ours and timm's, two blocks deep, each as it is drawn from the same seed."""
    description = described(ModelSource(name=name, image_px=_image(name)))
    assert description is not None
    torch.manual_seed(3)
    ours = build(msgspec.structs.replace(description.architecture, depth=2), CLASSES)
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=CLASSES, depth=2, img_size=_image(name))
    return ours, theirs


def _small(name: str) -> tuple[VisionTransformer, TimmVisionTransformer]:
    """A model of ours and timm's, two blocks deep, with the same values in both and none left at zero or one."""
    ours, theirs = _fresh(name)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            change = torch.randn_like(mine) * 0.02
            mine.add_(change)
            other.add_(change)
    return ours, theirs


def _image(name: str) -> int:
    return 4 * (14 if "patch14" in name else 32 if "patch32" in name else 16)


def _fixed(model: object) -> list[tuple[str, Tensor]]:
    return list(model.state_dict().items())  # type: ignore[attr-defined]


# --- every known model ---


@pytest.mark.parametrize("name", known_models())
def test_a_known_model_is_built_as_timm_builds_it(name: str) -> None:
    ours, shape = build_meta(ModelSource(name=name), CLASSES)
    assert isinstance(ours, VisionTransformer)
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=CLASSES)
    assert [(key, value.shape) for key, value in _fixed(ours)] == [(key, value.shape) for key, value in _fixed(theirs)]
    for what in ("num_prefix_tokens", "global_pool", "num_features", "no_embed_class", "pool_include_prefix"):
        assert getattr(ours, what) == getattr(theirs, what), what
    assert shape.fused_qkv == shape_of(theirs, name).fused_qkv
    assert preprocess_of(ours) == preprocess_of(theirs)
    _assert_config_is(ours.pretrained_cfg, theirs.pretrained_cfg)


def _assert_config_is(ours: dict[str, object], theirs: dict[str, object]) -> None:
    left_out = ("description", "origin_url", "paper_name", "paper_ids", "notes")
    wanted = {key: value for key, value in theirs.items() if key not in left_out}
    assert msgspec.json.decode(msgspec.json.encode(ours)) == msgspec.json.decode(msgspec.json.encode(wanted))


@pytest.mark.parametrize("name", [tag for name in known_models() for tag in known_tags(name)[1:]])
def test_a_tag_has_the_size_and_numbers_that_timm_has_for_it(name: str) -> None:
    ours = build_meta(ModelSource(name=name), CLASSES)[0]
    assert isinstance(ours, VisionTransformer)
    config = timm.get_pretrained_cfg(name).to_dict()
    _assert_config_is(ours.pretrained_cfg, {**config, "architecture": name.split(".")[0]})
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=CLASSES)
    assert theirs.pos_embed.shape == ours.pos_embed.shape
    assert preprocess_of(ours) == preprocess_of(theirs)


def test_most_of_timms_vision_transformers_are_known_and_no_more() -> None:
    names = {*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")}
    assert set(known_models()) <= names
    assert len(known_models()) > 0.8 * len(names)


# --- bits ---


@pytest.mark.parametrize("name", KINDS)
def test_fresh_weights_are_drawn_as_timm_draws_them(name: str) -> None:
    ours, theirs = _fresh(name)
    for (key, mine), (their_key, other) in zip(_fixed(ours), _fixed(theirs), strict=True):
        assert key == their_key
        assert torch.equal(mine, other), key


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_all_gradients_are_timms(name: str, training: bool) -> None:
    ours, theirs = _small(name)
    torch.manual_seed(5)
    images = torch.randn(3, 3, _image(name), _image(name))
    answers = []
    for model in (ours, theirs):
        model.train(training)
        logits = model(images)
        logits.square().sum().backward()
        answers.append((logits, model.forward_head(model.forward_features(images), pre_logits=True)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None, key
        assert torch.equal(mine.grad, other.grad), key


@pytest.mark.parametrize("name", KINDS)
def test_the_cost_model_sees_the_same_model(name: str) -> None:
    ours, theirs = (settled(shape_of(model, name)) for model in _small(name))
    assert ours == theirs


# --- weights ---


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
@pytest.mark.parametrize("grid", [3, 4, 6])
def test_a_files_position_embedding_is_resized_as_timm_does_it(name: str, grid: int) -> None:
    ours, theirs = _small(name)
    patch = theirs.patch_embed.patch_size[0]
    saved = timm.create_model(name, num_classes=CLASSES, depth=2, img_size=grid * patch).state_dict()
    converted = timm.models.vision_transformer.checkpoint_filter_fn(dict(saved), theirs, adapt_layer_scale=True)
    own = as_the_models(dict(saved), ours)
    assert own.keys() == converted.keys()
    assert all(torch.equal(own[key], value) for key, value in converted.items())


def test_older_names_are_understood_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = _small("deit3_small_patch16_224")
    monkeypatch.setattr(stock, "converted", lambda *_: pytest.fail("went through timm"))
    older = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in _fixed(theirs)}
    older["pre_logits.fc.weight"] = torch.zeros(2)
    assert as_the_models(older, ours).keys() == theirs.state_dict().keys()


def test_a_foreign_layout_goes_through_timm() -> None:
    ours, theirs = _small("vit_small_patch14_dinov2")
    foreign = {**theirs.state_dict(), "mask_token": torch.zeros(1, 384)}
    found = as_the_models(dict(foreign), ours)
    assert found.keys() == theirs.state_dict().keys()


# --- who builds what ---


def test_a_folder_whose_arguments_are_not_known_is_timms_to_build(tmp_path: Path) -> None:
    saved = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": {"depth": 2, "img_size": 32, "drop_path_rate": 0.1},
        "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True, "classifier": "head"},
    }
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(saved))
    source = ModelSource(name=f"local-dir:{tmp_path}", pretrained=False)
    assert described(source) is None
    assert isinstance(load_model(source, CLASSES).model, TimmVisionTransformer)
    del saved["model_args"]["drop_path_rate"]  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(saved))
    assert described(source) is not None
    model = load_model(source, CLASSES).model
    assert isinstance(model, VisionTransformer)
    theirs = timm.create_model(source.name, num_classes=CLASSES)
    assert [(key, value.shape) for key, value in _fixed(model)] == [(key, value.shape) for key, value in _fixed(theirs)]
    assert preprocess_of(model) == preprocess_of(theirs)
    _assert_config_is(model.pretrained_cfg, theirs.pretrained_cfg)
    assert resolve_model_data_config(theirs)["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 5},
        {"class_token": False},
        {"depth": 0},
        {"reg_tokens": -1},
        {"global_pool": "max"},
        {"unheard_of": 1},
        {"mlp_ratio": 1e-9},
        {"distilled": True, "reg_tokens": 2},
    ],
)
def test_an_architecture_that_is_none_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(changes, Architecture)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"])
def test_what_is_described_from_data_is_what_would_be_built(name: str) -> None:
    for image_px in (None, 4 * 16):
        source = ModelSource(name=name, image_px=image_px)
        model, shape = build_meta(source, CLASSES)
        found, preprocess = describe(source, CLASSES)
        assert settled(found) == settled(shape)
        assert found == known_shape(name, CLASSES, image_px)
        assert preprocess == preprocess_of(model)


# --- without timm ---


@pytest.fixture
def _no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)


@pytest.mark.usefixtures("_no_timm")
def test_without_timm_the_rest_is_refused_by_name() -> None:
    with pytest.raises(BackendUnavailable, match="needs timm, which is not here"):
        load_model(ModelSource(name="local-dir:" + str(_folder_of("test_vit")), pretrained=False), CLASSES)
    with pytest.raises(UnknownModel, match=r"known without timm.*Did you mean deit_tiny_patch16_224"):
        load_model(ModelSource(name="deit_tiny_patch16_244", pretrained=False), CLASSES)
    with pytest.raises(UnknownModel, match=r"Try deit_tiny_patch16_224 or deit_tiny_patch16_224\.fb_in1k"):
        load_model(ModelSource(name="deit_tiny_patch16_224.nonsense", pretrained=False), CLASSES)


def _folder_of(architecture: str) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_bytes(msgspec.json.encode({"architecture": architecture, "pretrained_cfg": {}}))
    return folder


# Modules that cost a small board what training needs.
FORBIDDEN = ("timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy", "huggingface_hub", "onnx")


@pytest.mark.parametrize("model", ["edgetune_micro", "deit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_loading_and_describing_imports_none_of_what_a_small_board_has_no_room_for(model: str) -> None:
    pretrained = model == "edgetune_micro"
    script = (
        "import sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "from edgetune.vit.models import ModelSource, describe, load_model\n"
        f"source = ModelSource(name={model!r}, pretrained={pretrained}, image_px={None if pretrained else 32})\n"
        "describe(source, 3)\n"
        "load_model(source, 3)\n"
        f"print(*[name for name in {FORBIDDEN!r} if name in sys.modules and name not in before])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_table_is_read_without_its_other_entries() -> None:
    assert isinstance(known._models()["deit_tiny_patch16_224"], msgspec.Raw)
