"""Frozen weights as bfloat16: half the bytes at rest, rounded once, and float32 arithmetic all the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import zoo
from live_bytes import live_growth_bytes
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from edgetune.backends.pytorch import TorchBackend
from edgetune.cost import Recompute, Selection
from edgetune.errors import UnsupportedModel
from edgetune.optim import OptimizerSettings
from edgetune.vit.half import store_half
from edgetune.vit.loop import apply_selection, forward


def _rounded(model: VisionTransformer, blocks: int) -> VisionTransformer:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks[:blocks]:
            for value in block.parameters():
                value.copy_(value.bfloat16().float())
    return model


def _above(model: VisionTransformer, half: int) -> Selection:
    return zoo.keep_all(model, tuple(block >= half for block in range(zoo.depth(model))))


def _gradients(model: VisionTransformer, selection: Selection) -> tuple[Tensor, dict[str, Tensor]]:
    apply_selection(model, selection)
    torch.manual_seed(7)
    logits, _ = forward(model, zoo.images(model), selection)
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % zoo.CLASSES).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for value in model.parameters():
        value.grad = None
    return logits.detach(), gradients


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())


@pytest.mark.parametrize("name", zoo.ALL)
def test_outputs_and_gradients_are_those_of_a_float32_model_with_rounded_weights(name: str) -> None:
    model = zoo.build(name)
    half = zoo.depth(model) - 1
    expected = _rounded(model, half)
    store_half(model, half)
    selection = _above(model, half)
    (logits, gradients), (wanted, wanted_gradients) = (_gradients(each, selection) for each in (model, expected))
    assert torch.equal(logits, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    assert all(torch.equal(value, wanted_gradients[key]) for key, value in gradients.items())
    if name in zoo.ADAPTIVE:
        tokens = tuple(max(1, count - 2 * block) for block, count in enumerate(selection.tokens))
        pruned = Selection(selection.trains, tokens)
        assert torch.equal(_gradients(model, pruned)[0], _gradients(expected, pruned)[0])
    with torch.inference_mode():
        assert torch.equal(model.eval()(zoo.images(model)), expected.eval()(zoo.images(expected)))


@pytest.mark.parametrize("level", list(Recompute))
def test_a_half_block_on_the_gradients_path_passes_the_same_gradient_on(level: Recompute) -> None:
    """No plan puts one there, since its float32 copies are kept for the backward; but it is no trap either."""
    model = zoo.build("layer scale, drop path")
    expected = _rounded(model, 4)
    for block in (1, 2):
        part = nn.Module()
        part.blocks = [model.blocks[block]]  # type: ignore[assignment]
        store_half(part, 1)  # type: ignore[arg-type]
        for value, other in zip(model.blocks[block].parameters(), expected.blocks[block].parameters(), strict=True):
            assert torch.equal(value.float(), other)
    for block in (0, 3):
        expected.blocks[block].load_state_dict(model.blocks[block].state_dict())
    selection = Selection((True, False, False, True), (16,) * 4, True, (level,) * 4)
    (logits, gradients), (wanted, wanted_gradients) = (_gradients(each, selection) for each in (model, expected))
    assert torch.equal(logits, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    assert all(torch.equal(value, wanted_gradients[key]) for key, value in gradients.items())


def test_what_rests_takes_half() -> None:
    made: list[VisionTransformer] = []
    before, block = _bytes(zoo.build("deit_tiny")), _bytes(zoo.build("deit_tiny").blocks[0])
    at_rest = live_growth_bytes(lambda: made.append(zoo.build("deit_tiny")))
    # Built while events are seen, since only what was allocated then is seen to go.
    growth = live_growth_bytes(lambda: store_half(made.append(zoo.build("deit_tiny")) or made[-1], 3))  # type: ignore[func-returns-value]
    model = made[-1]
    assert _bytes(model) == before - 3 * block // 2
    assert growth[-1] == at_rest[-1] - 3 * block // 2
    # One weight exists twice while it is stored anew.
    assert max(growth) <= at_rest[-1] + max(value.numel() for value in model.blocks[0].parameters()) * 2
    assert [{value.dtype for value in part.parameters()} for part in model.blocks[2:4]] == [
        {torch.bfloat16},
        {torch.float32},
    ]
    hooks = zoo.hooks(model)
    assert live_growth_bytes(lambda: store_half(model, 3)) == []  # again: nothing to do
    assert zoo.hooks(model) == hooks
    store_half(model, 4)
    assert _bytes(model) == before - 2 * block


def test_one_modules_float32_copy_exists_at_a_time() -> None:
    model = zoo.tiny(embed_dim=192, num_heads=3, depth=6, img_size=16).eval()  # four patches: weights are what is large
    store_half(model, 6)
    tokens = torch.zeros(1, 5, 192)

    def run() -> None:
        with torch.no_grad():
            for block in model.blocks:
                block(tokens)

    run()
    growth = live_growth_bytes(run)
    largest = (4 * 192 * 192 + 4 * 192) * 4
    activations = 5 * 192 * (4 + 4 + 4) * 4
    assert largest <= max(growth) <= largest + activations
    assert growth[-1] == 0


def _backend(model: VisionTransformer, half: int) -> TorchBackend:
    backend = TorchBackend(model, OptimizerSettings())
    backend.store_half(half)
    return backend


def test_tensors_are_float32_arrays_under_the_same_names_in_the_same_order() -> None:
    model = zoo.build("layer scale, drop path")
    expected = _rounded(model, 2).state_dict()
    backend = _backend(model, 2)
    tensors = backend.model_tensors()
    assert list(tensors) == list(expected)
    assert len(tensors) == len(expected)
    backend.evaluate(zoo.images(model).numpy())  # which widens and narrows each
    assert list(backend.model_tensors()) == list(expected)
    for name, array in tensors.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        assert np.array_equal(array, expected[name].numpy())


def test_what_was_saved_is_restored_whether_or_not_the_rest_is_stored_half() -> None:
    saved = {name: np.array(value) for name, value in _backend(zoo.build("q and k norm"), 2).model_tensors().items()}
    for half in (0, 2):
        other = zoo.tiny(qk_norm=True, norm_layer=type(zoo.build("q and k norm").norm))
        backend = _backend(other, half)
        backend.restore(saved, {}, {})
        assert all(np.array_equal(saved[name], value) for name, value in backend.model_tensors().items())
        assert {value.dtype for value in other.blocks[0].parameters()} == {torch.bfloat16 if half else torch.float32}


def test_a_half_block_is_refused_training() -> None:
    model = zoo.build("layer scale, drop path")
    backend = _backend(model, 2)
    batch = (zoo.images(model).numpy(), np.array([0, 1]))
    options = {"images": 2, "weight_sum": 2.0, "learning_rate": 0.1, "seed": 0, "with_deltas": False}
    with pytest.raises(UnsupportedModel, match=r"blocks\.1\.\S+ is stored as torch\.bfloat16"):
        backend.step([batch], Selection((False, True, True, True), (16,) * 4), **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel):  # it did not count as selected
        backend.step([batch], Selection((False, True, True, True), (16,) * 4), **options)  # type: ignore[arg-type]
    assert backend.step([batch], _above(model, 2), **options).updated  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_forward_that_fails_gives_the_stored_weights_back(error: type[BaseException]) -> None:
    model = zoo.build("layer scale, drop path").eval()
    pictures = zoo.images(model)
    store_half(model, 3)
    with torch.no_grad():
        expected = model(pictures)
    stored = dict(model.state_dict())
    calls: list[str] = []

    def fail(*_: object) -> None:
        calls.append("fail")
        raise error

    # In the middle of a layer, whose weights are wide then.
    layer = model.blocks[1].mlp.fc1
    layer.forward = fail
    with pytest.raises(error), torch.no_grad():
        model(pictures)
    del layer.forward
    assert calls
    if error is MemoryError:
        assert {name: value.dtype for name, value in model.state_dict().items()} == {
            name: value.dtype for name, value in stored.items()
        }
    with torch.no_grad():
        assert torch.equal(model(pictures), expected)
    again = model.state_dict()
    assert all(again[name].data_ptr() == value.data_ptr() for name, value in stored.items())


def test_an_allocation_that_fails_while_a_weight_is_widened_gives_the_stored_weights_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.build("layer scale, drop path").eval()
    store_half(model, 3)
    stored = model.state_dict()
    layer, left = model.blocks[1].mlp.fc1, 1  # its weight is widened, its bias no more
    widen = Tensor.float

    def fail(tensor: Tensor) -> Tensor:
        nonlocal left
        if tensor.shape in (layer.weight.shape, layer.bias.shape) and (left := left - 1) < 0:
            raise RuntimeError("can't allocate memory")
        return widen(tensor)

    monkeypatch.setattr(Tensor, "float", fail)
    with pytest.raises(RuntimeError, match="can't allocate"), torch.no_grad():
        model(zoo.images(model))
    monkeypatch.undo()
    again = model.state_dict()
    assert all(again[name].data_ptr() == value.data_ptr() for name, value in stored.items())
