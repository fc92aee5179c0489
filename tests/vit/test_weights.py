"""Weights into models with no second copy: what is loaded equals what timm loads, and the kernel's mark says what it took."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import timm
import zoo
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from edgetune import process
from edgetune.errors import WeightsError
from edgetune.units import MIB
from edgetune.vit.hub import pretrained_file
from edgetune.vit.models import LoadedModel, ModelSource, load_copies, load_model
from edgetune.vit.weights import (
    built_empty,
    classifier_names,
    load_all_weights,
    load_weights,
    read_state,
    reading_bytes,
)

TINY = "test_vit"  # timm's own model for tests: 64 wide, 6 deep, 160 px


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer, those that are not saved included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _classifier(model: VisionTransformer) -> set[str]:
    return {
        name for name in model.state_dict() if name.startswith(tuple(f"{head}." for head in classifier_names(model)))
    }


def _assert_equal(ours: VisionTransformer, theirs: VisionTransformer, without: Collection[str] = ()) -> None:
    mine, others = _tensors(ours), _tensors(theirs)
    assert list(mine) == list(others)
    for name in mine.keys() - set(without):
        assert mine[name].dtype is others[name].dtype, name
        assert mine[name].stride() == others[name].stride(), name
        assert torch.equal(mine[name], others[name]), name


def _named(build: Callable[[], VisionTransformer]) -> Callable[[], VisionTransformer]:
    """With what timm's factory leaves on a model, for those that are built without it."""

    def build_named() -> VisionTransformer:
        model = build()
        model.pretrained_cfg = getattr(model, "pretrained_cfg", {"architecture": "tiny"})
        return model

    return build_named


# --- equal to what timm loads ---


@pytest.mark.parametrize("kind", zoo.ALL)
def test_a_model_filled_without_a_copy_equals_one_that_was_built_and_loaded(kind: str, tmp_path: Path) -> None:
    build, path = _named(zoo.ALL[kind]), tmp_path / "model.safetensors"
    theirs = zoo.build(kind).eval()
    save_file(theirs.state_dict(), path)
    ours = built_empty(build).eval()
    load_all_weights(ours, path)
    _assert_equal(ours, theirs)
    images = zoo.images(theirs)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))

    for_other_classes = built_empty(build).eval()
    load_weights(for_other_classes, path)
    _assert_equal(for_other_classes, theirs, without=_classifier(theirs))
    for name in classifier_names(theirs):
        for_other_classes.get_submodule(name).load_state_dict(theirs.get_submodule(name).state_dict())
    with torch.no_grad():
        assert torch.equal(for_other_classes(images), theirs(images))


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "skip"])
def test_the_fresh_classifier_has_the_values_that_timm_gives_one_from_the_same_seed(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(zoo.tiny().state_dict(), path)
    model = built_empty(_named(lambda: zoo.tiny(weight_init=mode, num_classes=7)))
    layer = nn.Linear(48, 7)
    torch.manual_seed(5)
    load_weights(model, path)
    torch.manual_seed(5)
    # timm's word for a layer's own values is "skip" to whoever builds a model, "reset" to itself.
    get_init_weights_vit(mode.replace("skip", "reset"), -math.log(7) if mode == "jax_nlhb" else 0.0)(layer, "head")
    assert torch.equal(model.head.weight, layer.weight)
    assert torch.equal(model.head.bias, layer.bias)
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 3, 32, 32))).all()


class _WithGrid(VisionTransformer):
    """What a file does not hold: a buffer that is not saved, and a tensor that is a plain attribute."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.register_buffer("grid", torch.linspace(0.0, 1.0, 16).square(), persistent=False)
        self.blocks[1].angles = torch.arange(5) * 0.1


def test_what_timm_computes_and_no_file_holds_is_computed_by_a_model_that_is_gone_afterwards(tmp_path: Path) -> None:
    built: list[weakref.ref[Any]] = []

    def build() -> VisionTransformer:
        model = _WithGrid(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4)
        model.pretrained_cfg = {}
        built.append(weakref.ref(model))
        return model

    whole = build()
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    built.clear()
    model = built_empty(build)
    assert [ref() for ref in built] == [model, None]
    load_all_weights(model, tmp_path / "model.safetensors")
    _assert_equal(model, whole)
    assert torch.equal(model.blocks[1].angles, whole.blocks[1].angles)
    assert "grid" not in model.state_dict()


@pytest.mark.parametrize(("name", "reduced"), [(TINY, {}), ("flexivit_small", {"depth": 1}), ("deit3_small_patch16_224", {"depth": 1})])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_are_changed_as_timm_changes_them(
    name: str, reduced: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    path = tmp_path / "weights.safetensors"
    state = timm.create_model(name, num_classes=7, **reduced).state_dict()
    save_file({key: value.to(dtype) for key, value in state.items()}, path)
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": name, "model_args": reduced, "pretrained_cfg": {}})
    )
    loaded = load_model(ModelSource(name=f"local-dir:{tmp_path}", weights=str(path), image_px=96), 7)
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=7, img_size=96, **reduced
    )
    _assert_equal(loaded.model, theirs, without=_classifier(theirs))


# --- what files hold ---

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_becomes_the_models_own(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {name: value.to(dtype) for name, value in zoo.build("deit_tiny").state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model = built_empty(_named(zoo.ALL["deit_tiny"]))
    load_weights(model, path)
    own = model.state_dict()
    for name in own.keys() - _classifier(model):
        assert own[name].dtype is torch.float32
        assert torch.equal(own[name], state[name].float()), name


def test_a_number_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    state = {name: value.double() for name, value in zoo.tiny().state_dict().items()}
    state["norm.bias"][3] = 1e300
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"1 not finite numbers \(norm.bias\)"):
        load_weights(built_empty(_named(zoo.tiny)), tmp_path / "weights.safetensors")


def test_counters_of_another_width_become_the_models_own(tmp_path: Path) -> None:
    kind = "hybrid, batch norm"
    state = zoo.build(kind).state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    save_file(state | {name: state[name].int() + 3 for name in counters}, tmp_path / "weights.safetensors")
    model = built_empty(_named(zoo.ALL[kind]))
    load_weights(model, tmp_path / "weights.safetensors")
    assert counters
    assert all(model.state_dict()[name].dtype is torch.int64 for name in counters)
    assert all(model.state_dict()[name] == 3 for name in counters)


def _shared(state: dict[str, Tensor]) -> None:
    state["blocks.1.norm1.weight"] = state["blocks.0.norm1.weight"]


def _cut_from_one(state: dict[str, Tensor]) -> None:
    flat = torch.cat([value.reshape(-1) for value in state.values()])
    place = 0
    for name, value in state.items():
        state[name] = flat[place : place + value.numel()].view(value.shape)
        place += value.numel()


def _transposed(state: dict[str, Tensor]) -> None:
    for name in ("blocks.0.mlp.fc1.weight", "blocks.2.attn.qkv.weight"):
        state[name] = state[name].t().contiguous().t()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].to(memory_format=torch.channels_last)


def _negated(state: dict[str, Tensor]) -> None:
    state["norm.bias"] = torch.complex(torch.zeros(48), -state["norm.bias"]).conj().imag
    assert state["norm.bias"].is_neg()


@pytest.mark.parametrize("spoil", [_shared, _cut_from_one, _transposed, _negated])
def test_a_parameter_shares_its_memory_with_nothing(spoil: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    state = dict(zoo.tiny().state_dict())
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    model = built_empty(_named(zoo.tiny))
    load_weights(model, tmp_path / "weights.pth")
    own = model.state_dict()
    storages = [value.untyped_storage() for value in own.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for (name, value), storage in zip(own.items(), storages, strict=True):
        assert value.is_contiguous(), name
        assert storage.nbytes() == value.nbytes, name
        assert name in _classifier(model) or torch.equal(value, state[name]), name
        value.numpy()  # which no lazily negated tensor allows


def test_a_training_checkpoint_with_its_command_line_is_loaded(tmp_path: Path) -> None:
    from argparse import Namespace

    state = zoo.tiny().state_dict()
    torch.save({"model": state, "args": Namespace(lr=1e-3, name="run")}, tmp_path / "checkpoint.pth")
    model = built_empty(_named(zoo.tiny))
    load_weights(model, tmp_path / "checkpoint.pth")
    assert torch.equal(model.pos_embed, state["pos_embed"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header["a"].update(dtype="F4"), "a dtype edgetune does not know"),
        (lambda header: header["a"].update(shape=[-2, -2]), "negative"),
        (lambda header: header["a"].update(shape=[3]), "place of tensor 'a'"),
        (lambda header: header["a"].update(data_offsets=[4, 20]), "place of tensor 'a'"),
        (lambda header: header["a"].update(shape="x"), "header can't be read"),
        (lambda header: header.update(b=header["a"]), "place of tensor 'b'"),
        (lambda header: header.clear(), "its tensors need 0 bytes, it holds 16"),
    ],
)
def test_a_damaged_safetensors_header_is_refused_in_words(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    header: dict[str, Any] = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    change(header)
    text = json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(WeightsError, match=rf"weights\.safetensors can't be loaded as weights \(.*{said}"):
        read_state(path)


# --- the hub ---

REPOSITORY = "models--timm--test_vit.r160_in1k"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, and no network."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.create_connection", _refuse)
    return tmp_path / "hub"


def _refuse(*_address: Any, **_options: Any) -> None:
    raise OSError("no network in tests")


def _cached(cache: Path, repository: str) -> Path:
    """The folder in which the client has a repository's files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (cache / repository / "refs").mkdir()
    (cache / repository / "refs" / "main").write_text(commit)
    return folder


def _state(classes: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(8)
    return timm.create_model(TINY, num_classes=classes).state_dict()


def _pretrained(name: str, **options: Any) -> LoadedModel:
    return load_model(ModelSource(name=name, **options), 4)


@pytest.mark.parametrize("image_px", [None, 96])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_the_hub_has_is_loaded_as_timm_loads_it(file: str, image_px: int | None, cache: Path) -> None:
    path = _cached(cache, REPOSITORY) / file
    (save_file if file.endswith("safetensors") else torch.save)(_state(), path)
    loaded = _pretrained(TINY, image_px=image_px)
    size = {} if image_px is None else {"img_size": image_px}
    theirs = timm.create_model(TINY, pretrained=True, num_classes=4, **size)
    _assert_equal(loaded.model, theirs, without=_classifier(theirs))
    assert not torch.equal(loaded.model.pos_embed, timm.create_model(TINY, num_classes=4, **size).pos_embed)


def test_the_safe_file_is_preferred(cache: Path) -> None:
    folder = _cached(cache, REPOSITORY)
    save_file(_state(), folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    assert torch.equal(_pretrained(TINY).model.pos_embed, _state()["pos_embed"])


def test_a_repository_is_built_from_its_own_config_and_weights(cache: Path) -> None:
    folder = _cached(cache, "models--somebody--beetles")
    own = {"mean": [0.1] * 3, "classifier": "head", "input_size": [3, 160, 160], "fixed_input_size": True}
    config = {"architecture": TINY, "num_classes": 9, "model_args": {"depth": 2}, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(8)
    state = timm.create_model(TINY, num_classes=9, depth=2).state_dict()
    save_file(state, folder / "model.safetensors")
    loaded = _pretrained("hf-hub:somebody/beetles")
    theirs = timm.create_model("hf-hub:somebody/beetles", pretrained=True, num_classes=4)
    _assert_equal(loaded.model, theirs, without=_classifier(theirs))
    assert loaded.model_args == {"depth": 2}
    assert loaded.preprocess.mean == (0.1, 0.1, 0.1)
    assert torch.equal(loaded.model.pos_embed, state["pos_embed"])


def test_the_hubs_file_may_hold_more_than_the_model_but_not_less(cache: Path) -> None:
    path, state = _cached(cache, REPOSITORY) / "model.safetensors", _state()
    save_file(state | {"attn_pool.latent": torch.zeros(1, 1, 64)}, path)
    assert torch.equal(_pretrained(TINY).model.pos_embed, state["pos_embed"])
    del state["norm.bias"]
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"1 missing \(norm.bias\)"):
        _pretrained(TINY)


def test_an_address_is_looked_up_in_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vit.pth.tar"
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    assert pretrained_file({"url": "https://nowhere.invalid/a/vit.pth.tar"}) == path


def test_a_model_without_pretrained_weights_says_so_and_names_the_two_ways_out(cache: Path) -> None:
    with pytest.raises(WeightsError, match=r"none of test_vit4.*--weights FILE.safetensors.*--no-pretrained"):
        _pretrained("test_vit4")


# --- memory ---


def test_what_reading_takes_is_known_from_the_header(tmp_path: Path) -> None:
    model = zoo.tiny()
    floats = sum(value.numel() for value in model.parameters()) - sum(
        value.numel() for value in model.head.parameters()
    )
    for dtype, size in ((torch.float64, 4), (torch.float32, 4), (torch.bfloat16, 2)):
        path = tmp_path / "weights.safetensors"
        save_file({name: value.to(dtype) for name, value in model.state_dict().items()}, path)
        assert reading_bytes(path) == size * floats
        assert size * floats == sum(value.nbytes for value in read_state(path, without=("head.",)).values())
    torch.save({"model": model.state_dict(), "optimizer": [torch.zeros(1000)]}, tmp_path / "weights.pth")
    assert reading_bytes(tmp_path / "weights.pth") == (tmp_path / "weights.pth").stat().st_size
    (tmp_path / "weights.safetensors").write_bytes(b"broken")
    for name in ("weights.safetensors", "nowhere.pth"):
        with pytest.raises(WeightsError, match=name):
            reading_bytes(tmp_path / name)


def test_only_a_file_that_holds_more_than_the_model_counts_as_more_than_one_copy(tmp_path: Path) -> None:
    state = _state()
    size = sum(value.nbytes for value in state.values())
    model = ModelSource(name=TINY)
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "half.safetensors")
    save_file(state | {"text.weight": torch.zeros(size // 4)}, tmp_path / "towers.safetensors")
    torch.save({"model": state, "optimizer": [state, {k: v + 1 for k, v in state.items()}]}, tmp_path / "run.pth")
    copies = {path.stem: load_copies(ModelSource(name=TINY, weights=str(path)), size) for path in tmp_path.glob("*.*")}
    head = sum(state[name].nbytes for name in ("head.weight", "head.bias"))
    assert copies.pop("run") == pytest.approx(2.0, abs=0.2)
    assert copies == {"half": 1.0, "towers": 2.0 - head / size}
    assert load_copies(model, size) == load_copies(ModelSource(name=TINY, pretrained=False), size) == 1.0
    with pytest.raises(WeightsError, match="no weights file at"):
        load_copies(ModelSource(name=TINY, weights="nowhere.pth"), size)


CHILD = """
import gc, json, sys
from pathlib import Path
from edgetune.allocator import limit_allocator
limit_allocator()
import torch
torch.set_num_threads(1)
from edgetune import process
from edgetune.backends import pytorch
from edgetune.optim import OptimizerSettings
from edgetune.vit.models import ModelSource, describe, load_model, load_saved
folder = Path(sys.argv[1])
name = f"local-dir:{folder}"
pytorch.warm_up(OptimizerSettings())
describe(ModelSource(name=name), 7)
found = {}
for path in sorted(folder.glob("weights*")):
    for saved in (False, True) if path.name == "weights-32.safetensors" else (False,):
        gc.collect()
        before = process.snapshot().rss_bytes
        process.reset_high_water()
        if saved:
            model = load_saved(folder, path, 7)
        else:
            model = load_model(ModelSource(name=name, weights=str(path)), 7).model
        now, high = process.measure()
        found[path.name + ", saved" * saved] = [now.rss_bytes - before, high - before]
        del model
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not process.reset_works(), reason="the high-water mark is Linux's, where it can be reset")
def test_loading_takes_the_weights_once(tmp_path: Path) -> None:
    reduced = {"depth": 4}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_base_patch16_224", "model_args": reduced, "pretrained_cfg": {}})
    )
    state = timm.create_model("vit_base_patch16_224", num_classes=7, **reduced).state_dict()
    for width, dtype in ((16, torch.float16), (32, torch.float32)):
        converted = {name: value.to(dtype) for name, value in state.items()}
        save_file(converted, tmp_path / f"weights-{width}.safetensors")
        torch.save({"state_dict": converted}, tmp_path / f"weights-{width}.pth")
    weights = sum(value.nbytes for value in state.values()) / MIB
    largest = max(value.nbytes for value in state.values()) / MIB
    assert weights > 100
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 5
    for kind, (left, peak) in found.items():
        assert abs(left / MIB - weights) < 3, kind
        # A tensor that becomes wider exists twice for a moment.
        spare = 3 + (largest if "16" in kind else 0)
        assert peak / MIB < weights + spare, f"{kind}: {peak / MIB:.1f} MiB for {weights:.1f}"
