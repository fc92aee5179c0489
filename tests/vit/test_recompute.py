"""Recompute changes what is kept and nothing else: not a bit of a result, nothing of the model, no import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")

import zoo
from live_bytes import live_growth_bytes
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgetune.cost import Recompute, Selection
from edgetune.regions import region_of, trains
from edgetune.vit import loop
from edgetune.vit.loop import apply_selection, forward
from edgetune.vit.recompute import has_mlp_half, recomputed

LARGE = ("deit_tiny", "vit_base", "clip", "siglip", "hybrid, group norm", "hybrid, batch norm", "parallel things")


class Step(NamedTuple):
    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    random_state: Tensor

    def differs(self, other: Step) -> list[str]:
        """What is not the same to the last bit."""
        wrong = [name for name in ("loss", "logits", "random_state") if not _equal(self, other, name)]
        wrong += sorted(self.gradients.keys() ^ other.gradients.keys())
        both = self.gradients.keys() & other.gradients.keys()
        return wrong + [name for name in both if not torch.equal(self.gradients[name], other.gradients[name])]


def _equal(one: Step, other: Step, field: str) -> bool:
    return torch.equal(getattr(one, field), getattr(other, field))


def _step(model: VisionTransformer, selection: Selection) -> Step:
    apply_selection(model, selection)
    pictures = zoo.images(model)
    torch.manual_seed(7)
    logits, _ = forward(model, pictures, selection)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % zoo.CLASSES)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for value in model.parameters():
        value.grad = None
    return Step(loss.detach(), logits.detach(), gradients, torch.get_rng_state())


def _levels(model: VisionTransformer) -> Iterator[tuple[Recompute, ...]]:
    depth = zoo.depth(model)
    yield (Recompute.BLOCK,) * depth
    if has_mlp_half(model.blocks[0]):
        yield (Recompute.MLP,) * depth
        yield tuple(list(Recompute)[block % 3] for block in range(depth))


def _selection(model: VisionTransformer, selected: str) -> Selection:
    depth, tokens = zoo.depth(model), model.patch_embed.num_patches
    if selected == "every second":
        return zoo.keep_all(model, tuple(block % 2 == 1 for block in range(depth)))
    if selected == "first only":
        return zoo.keep_all(model, tuple(block == 0 for block in range(depth)))
    if selected == "pruned":
        return Selection((True,) * depth, tuple(max(1, tokens - 3 * block) for block in range(depth)))
    return zoo.everything(model)


def _with(selection: Selection, levels: tuple[Recompute, ...]) -> Selection:
    return Selection(selection.trains, selection.tokens, selection.embeddings_train, levels)


def _untouched(model: VisionTransformer) -> bool:
    return zoo.hooks(model) == 0 and not any("forward" in vars(module) for module in model.modules())


CASES = [
    pytest.param(name, selected, marks=pytest.mark.slow if name in LARGE and selected != "everything" else ())
    for name in zoo.ALL
    for selected in ("everything", "every second", "first only", "pruned")
    if name in zoo.ADAPTIVE or selected != "pruned"
]


@pytest.mark.parametrize(("name", "selected"), CASES)
def test_recompute_equals_keeping_and_torchs_checkpoint_to_the_last_bit(
    name: str, selected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(name)
    selection = _selection(model, selected)
    plain = _step(model, selection)
    assert plain.gradients.keys() == {
        name for name, _ in model.named_parameters() if trains(region_of(name), selection)
    }
    for levels in _levels(model):
        assert _step(model, _with(selection, levels)).differs(plain) == []
        assert _untouched(model)
    monkeypatch.setattr(
        loop, "run_recomputed", lambda block, tokens, _level: checkpoint(block, tokens, use_reentrant=False)
    )
    assert _step(model, selection).differs(plain) == []


@pytest.mark.parametrize("level", [Recompute.MLP, Recompute.BLOCK])
def test_what_is_drawn_again_is_what_was_drawn(level: Recompute) -> None:
    """With dropout and drop path at work, so that a second draw would show."""
    model = zoo.tiny(drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.2, init_values=0.3)
    selection = zoo.everything(model)
    drawn = _step(model, selection)
    assert _step(model, _with(selection, (level,) * 4)).differs(drawn) == []
    for module in model.modules():
        module.training = False
    silent = forward(model, zoo.images(model), selection)[0]
    assert not torch.equal(silent, drawn.logits)


def _raise_at(module: nn.Module, number: int) -> Callable[[], None]:
    """Raise MemoryError when the module runs for the time numbered, from 1. Returns what ends that."""
    count = 0

    def fail(_module: nn.Module, _inputs: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise MemoryError("no more")

    return module.register_forward_pre_hook(fail).remove


@pytest.mark.parametrize("part", ["norm2", "mlp.fc1", "mlp.act"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("level", [Recompute.MLP, Recompute.BLOCK])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(level: Recompute, when: str, part: str) -> None:
    """Each part runs once forward (norm2 twice where its own call only hands on) and once more in the backward."""
    model = zoo.build("layer scale, drop path")
    expected = _step(model, zoo.everything(model))
    selection = _with(zoo.everything(model), (level,) * 4)
    twice = part == "norm2" and level is Recompute.MLP
    end = _raise_at(model.blocks[2].get_submodule(part), 1 if when == "forward" else 3 if twice else 2)
    reached: list[bool] = []
    seen = model.head.register_forward_hook(lambda *_: reached.append(True))
    with pytest.raises(MemoryError, match="no more"):
        _step(model, selection)
    end()
    seen.remove()
    assert bool(reached) is (when == "backward")
    assert _untouched(model)
    for value in model.parameters():
        value.grad = None
    assert _step(model, selection).differs(expected) == []


def test_a_gradients_hook_that_raises_leaves_the_model_as_it_was() -> None:
    model = zoo.build("layer scale, drop path")
    selection = _with(zoo.everything(model), (Recompute.MLP,) * 4)
    expected = _step(model, selection)

    def fail(_gradient: Tensor) -> None:
        raise MemoryError("no more")

    handle = model.blocks[1].attn.proj.weight.register_hook(fail)
    with pytest.raises(MemoryError):
        _step(model, selection)
    handle.remove()
    for value in model.parameters():
        value.grad = None
    assert _untouched(model)
    assert _step(model, selection).differs(expected) == []


def test_a_failed_recomputation_gives_the_generator_back() -> None:
    model = zoo.build("dropout")
    selection = _with(zoo.everything(model), (Recompute.BLOCK,) * 4)
    apply_selection(model, selection)
    logits, _ = forward(model, zoo.images(model), selection)
    end = _raise_at(model.blocks[2].mlp.fc1, 1)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with pytest.raises(MemoryError):
        logits.sum().backward()
    end()
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_and_forwards_that_others_put_on_a_block_stay() -> None:
    model = zoo.build("deit_tiny")
    block = model.blocks[1]
    own = block.norm2.forward
    block.norm2.forward = lambda tokens: 2 * own(tokens)  # as libraries that wrap modules do
    changed = block.norm2.forward
    seen: list[tuple[int, ...]] = []
    handle = block.mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    selection = zoo.everything(model)
    plain = _step(model, selection)
    assert _step(model, _with(selection, (Recompute.MLP,) * zoo.depth(model))).differs(plain) == []
    assert block.norm2.forward is changed
    assert len(seen) == 2
    assert len(set(seen)) == 1
    handle.remove()


def _kept_bytes(model: VisionTransformer, selection: Selection) -> int:
    """Bytes that are alive after the forward because a backward may come."""
    apply_selection(model, selection)
    pictures = zoo.images(model, batch=4)
    kept: list[Tensor] = []
    return live_growth_bytes(lambda: kept.append(forward(model, pictures, selection)[0]))[-1]


def test_a_recomputed_block_keeps_its_input_alone() -> None:
    model = zoo.tiny(depth=8)
    selection = zoo.everything(model)
    everything, mlp, block = (_kept_bytes(model, _with(selection, (level,) * 8)) for level in Recompute)
    stream = 4 * 17 * 48 * 4
    state = torch.get_rng_state().numel()
    # What is left beside the blocks: the embedding's output, the final norm's input and output, and their statistics.
    assert 8 * (stream + state) <= block <= 8 * (stream + state) + 8 * stream
    assert block < mlp < everything


def test_a_graph_is_walked_back_once() -> None:
    inputs = torch.randn(3, 4, requires_grad=True)
    output = recomputed(lambda tokens: tokens.exp().sin(), inputs, random=False).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        output.backward()


def test_a_part_that_does_something_else_the_second_time_is_told() -> None:
    runs: list[int] = []

    def run(tokens: Tensor) -> Tensor:
        runs.append(1)
        return tokens.exp().sin() if len(runs) == 1 else tokens.exp()

    output = recomputed(run, torch.randn(3, 4, requires_grad=True), random=False)
    with pytest.raises(RuntimeError, match="kept 2 tensors, and 1 when"):
        output.sum().backward()


def test_recompute_imports_nothing() -> None:
    """Above all not torch._dynamo. Whatever timm itself imports is there after a step without recompute."""
    code = """
import sys, torch
from timm.models.vision_transformer import VisionTransformer
from edgetune.cost import Recompute, Selection
from edgetune.vit.loop import apply_selection, forward
model = VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=2)
def step(level):
    selection = Selection((True, True), (4, 2), True, (level,) * 2)
    apply_selection(model, selection)
    forward(model, torch.zeros(1, 3, 32, 32), selection)[0].sum().backward()
step(Recompute.NOTHING)
before = set(sys.modules)
step(Recompute.MLP), step(Recompute.BLOCK)
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
