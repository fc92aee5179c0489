"""The loop equals plain timm to the last bit where all tokens are kept, and does what it says where they are not."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

import timm
import zoo
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from edgetune.cost import Recompute, Selection
from edgetune.errors import UnsupportedModel
from edgetune.methods import adaptive_obstacle
from edgetune.vit.loop import (
    apply_selection,
    check_supported,
    class_attention,
    distances,
    embed,
    forward,
    keep_tokens,
    named_regions,
    region_of,
    run_block,
)
from edgetune.vit.shape import shape_of


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()}


def _backward(logits: Tensor) -> None:
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % zoo.CLASSES).backward()


def _same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> list[str]:
    """Names under which the two differ in any bit."""
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (value is other[name] is None or (value is not None and torch.equal(value, other[name])))
    ]


@pytest.mark.parametrize("name", zoo.ALL)
@pytest.mark.parametrize("selected", ["everything", "every second block"])
def test_all_tokens_kept_equals_plain_timm(name: str, selected: str) -> None:
    model = zoo.build(name)
    selection = zoo.everything(model)
    if selected == "every second block":
        selection = zoo.keep_all(model, tuple(block % 2 == 1 for block in range(zoo.depth(model))))
    apply_selection(model, selection)
    plain = copy.deepcopy(model)  # the same values, flags and modes, run by timm
    pictures = zoo.images(model)
    torch.manual_seed(7)
    logits, deltas = forward(model, pictures, selection, with_deltas=True)
    torch.manual_seed(7)
    expected = plain(pictures)
    assert torch.equal(logits, expected)
    assert len(deltas) == zoo.depth(model)
    _backward(logits)
    _backward(expected)
    gradients = _gradients(model)
    assert _same(gradients, _gradients(plain)) == []
    assert all((value is None) == (not model.get_parameter(key).requires_grad) for key, value in gradients.items())


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_model_is_never_changed(name: str) -> None:
    model, plain = zoo.build(name), zoo.build(name)
    selection = zoo.everything(model)
    tokens = [max(1, count - block) for block, count in enumerate(selection.tokens)]
    if name in zoo.ADAPTIVE:
        selection = Selection(selection.trains, tuple(tokens), embeddings_train=True)
    apply_selection(model, selection)
    _backward(forward(model, zoo.images(model), selection, with_deltas=True)[0])
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert _same(dict(model.state_dict()), dict(plain.state_dict())) == []
    assert zoo.hooks(model) == zoo.hooks(plain) == 0


def _full_attention(block: nn.Module, tokens: Tensor) -> Tensor:
    """The softmax matrix (B, H, T, T) that timm itself computes when attention is not fused."""
    seen: list[Tensor] = []
    block = copy.deepcopy(block).eval()
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        block(tokens)
    return seen[0]


@pytest.mark.parametrize("name", zoo.ADAPTIVE)
def test_class_attention_is_the_class_row_of_timms_own_attention(name: str) -> None:
    model = zoo.build(name).eval()
    block = model.blocks[-1]
    torch.manual_seed(3)
    tokens = 3 * torch.randn(2, model.num_prefix_tokens + 9, model.embed_dim)
    seen: list[Tensor] = []
    block.attn.qkv.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    block(tokens)
    row = class_attention(block.attn, seen[0])
    assert not row.requires_grad
    expected = _full_attention(block, tokens)[:, :, 0].mean(dim=1)
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", zoo.ADAPTIVE)
def test_pruning_equals_an_independent_computation(name: str) -> None:
    model = zoo.build(name).eval()
    prefix, count = model.num_prefix_tokens, model.patch_embed.num_patches
    selection = zoo.everything(model)
    kept = [count]
    while len(kept) < zoo.depth(model):
        kept.append(max(1, kept[-1] * 2 // 3))
    pictures = zoo.images(model, batch=3)
    logits, _ = forward(model, pictures, Selection(selection.trains, tuple(kept), embeddings_train=True))
    plain = copy.deepcopy(model)
    tokens = embed(plain, pictures)
    for block, leaving in zip(plain.blocks, [*kept[1:], kept[-1]], strict=True):
        row = _full_attention(block, tokens)[:, :, 0, prefix:].mean(dim=1)
        tokens = block(tokens)
        if leaving < row.shape[1]:
            rows = []
            for image in range(len(row)):
                best = sorted(row[image].argsort(descending=True)[:leaving].tolist())
                rows.append(tokens[image, [*range(prefix), *(prefix + token for token in best)]])
            tokens = torch.stack(rows)
    expected = plain.forward_head(plain.norm(tokens))
    assert torch.equal(logits, expected)
    _backward(logits)
    _backward(expected)
    for (key, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, msg=key)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("prefix", "keep"), [(1, 4), (5, 1), (0, 9), (2, 8)])
def test_the_most_attended_tokens_are_kept_in_their_order_and_prefix_tokens_always(
    batch: int, prefix: int, keep: int
) -> None:
    torch.manual_seed(batch)
    tokens = torch.randn(batch, prefix + 10, 6, requires_grad=True)
    row = torch.rand(batch, prefix + 10)
    row[:, :prefix] = -1.0  # nobody looks at them: they stay
    kept = keep_tokens(tokens, row, keep, prefix)
    assert kept.shape == (batch, prefix + keep, 6)
    for image in range(batch):
        best = sorted(range(10), key=lambda token: -row[image, prefix + token].item())[:keep]
        wanted = [*range(prefix), *(prefix + token for token in sorted(best))]
        assert torch.equal(kept[image], tokens[image, wanted])
    weight = torch.randn_like(kept)
    (kept * weight).sum().backward()
    ours, tokens.grad = tokens.grad, None
    index = torch.stack([(tokens[image, :, :1] == kept[image, None, :, 0]).nonzero()[:, 0] for image in range(batch)])
    index = index.sort(dim=1).values[:, :, None].expand(-1, -1, 6)
    (tokens.gather(1, index) * weight).sum().backward()
    assert torch.equal(ours, tokens.grad)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_distances_are_those_from_the_mean_of_the_patch_tokens(prefix: int) -> None:
    torch.manual_seed(prefix)
    tokens = torch.randn(2, prefix + 7, 5)
    patches = tokens[:, prefix:].double()
    wanted = (patches - patches.mean(dim=1, keepdim=True)).square().sum(dim=2).sqrt()
    found = distances(tokens, prefix)
    torch.testing.assert_close(found[:, prefix:], wanted.float())
    assert not found[:, :prefix].any()


def test_dropping_tokens_by_distance_needs_no_class_token_and_changes_no_gradient() -> None:
    model = zoo.build("siglip")
    tokens = torch.randn(2, 1 + model.patch_embed.num_patches, model.embed_dim, requires_grad=True)
    block = model.blocks[0]
    kept = run_block(block, tokens, 4, 1, Recompute.NOTHING, "distance")
    whole = block(tokens)
    wanted = keep_tokens(whole, distances(whole.detach(), 1), 4, 1)
    assert torch.equal(kept, wanted)
    (one,), (other,) = (torch.autograd.grad(part.sum(), [tokens], retain_graph=True) for part in (kept, wanted))
    assert torch.equal(one, other)


def test_keeping_tokens_saves_no_copy_of_what_was_there() -> None:
    saved: list[Tensor] = []
    tokens = torch.randn(2, 101, 64, requires_grad=True)

    def see(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        keep_tokens(tokens, torch.rand(2, 101), 10, 1)
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved) == 2 * 11 * 8


@pytest.mark.parametrize("name", ["deit_tiny", "dinov2 with registers", "distilled"])
def test_deltas_are_the_squared_change_of_the_class_token_mean_over_the_batch(name: str) -> None:
    model = zoo.build(name)
    count = model.patch_embed.num_patches
    tokens = tuple(max(1, count - 2 * block) for block in range(zoo.depth(model)))
    selection = Selection((False,) + (True,) * (zoo.depth(model) - 1), tokens)
    apply_selection(model, selection)
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].detach(), output.detach())))
        for block in model.blocks
    ]
    _, deltas = forward(model, zoo.images(model, batch=3), selection, with_deltas=True)
    for handle in handles:
        handle.remove()
    for delta, (before, after) in zip(deltas, seen, strict=True):
        assert not delta.requires_grad
        expected = sum(float((after[image, 0] - before[image, 0]).square().sum()) for image in range(3)) / 3
        assert delta.item() == pytest.approx(expected, rel=1e-5)
        assert delta > 0
    # Counting what each block was given shows that pruning reached it, and that deltas do not change that.
    assert [before.shape[1] - model.num_prefix_tokens for before, _ in seen] == list(tokens)


@pytest.mark.parametrize("lowest", range(5))
def test_nothing_below_the_lowest_trained_block_carries_gradient(lowest: int) -> None:
    model = zoo.build("layer scale, drop path")
    trains = tuple(block >= lowest and (block - lowest) % 2 == 0 for block in range(4))
    selection = zoo.keep_all(model, trains)
    apply_selection(model, selection)
    seen: list[tuple[bool, bool]] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _module, inputs, output: seen.append((inputs[0].requires_grad, output.requires_grad))
        )
    logits, _ = forward(model, zoo.images(model), selection)
    assert seen == [(block > lowest, block >= lowest) for block in range(4)]
    _backward(logits)
    with_gradient = {region for region, _, value in named_regions(model) if value.grad is not None}
    assert with_gradient == {block for block in range(4) if trains[block]} | {"head"}


def test_without_gradient_nothing_carries_gradient_whatever_is_selected() -> None:
    model = zoo.build("deit_tiny")
    selection = zoo.everything(model)
    apply_selection(model, selection)
    with torch.no_grad():
        logits, deltas = forward(model, zoo.images(model), selection, with_deltas=True)
    assert not logits.requires_grad
    assert not any(delta.requires_grad for delta in deltas)
    assert torch.is_grad_enabled()


def test_frozen_regions_are_in_eval_mode_and_trained_ones_are_not() -> None:
    model = zoo.build("dropout")
    model.eval()
    selection = zoo.keep_all(model, (False, True, False, True))
    apply_selection(model, selection)
    modes = {index: {module.training for module in block.modules()} for index, block in enumerate(model.blocks)}
    assert modes == {0: {False}, 1: {True}, 2: {False}, 3: {True}}
    assert not model.pos_drop.training
    assert not model.patch_embed.training
    assert model.head_drop.training
    apply_selection(model, zoo.everything(model))
    assert all(module.training for module in model.modules())
    apply_selection(model, zoo.keep_all(model, (False,) * 4))
    frozen = [*model.blocks, model.patch_embed, model.pos_drop]
    assert not any(module.training for part in frozen for module in part.modules())


def test_drop_path_and_dropout_are_silent_in_frozen_blocks() -> None:
    model = zoo.build("layer scale, drop path")
    assert any(isinstance(module, DropPath) for module in model.modules())
    pictures = zoo.images(model, batch=4)

    def outputs(trains: tuple[bool, ...]) -> set[float]:
        selection = zoo.keep_all(model, trains)
        apply_selection(model, selection)
        results = set()
        for seed in range(6):
            torch.manual_seed(seed)
            results.add(forward(model, pictures, selection)[0].sum().item())
        return results

    assert len(outputs((False,) * 4)) == 1
    assert len(outputs((True,) * 4)) > 1


def test_what_is_frozen_loses_its_gradient() -> None:
    model = zoo.build("layer scale, drop path")
    selection = zoo.everything(model)
    apply_selection(model, selection)
    _backward(forward(model, zoo.images(model), selection)[0])
    assert model.blocks[0].attn.qkv.weight.grad is not None
    apply_selection(model, zoo.keep_all(model, (False, True, True, True)))
    for region, name, parameter in named_regions(model):
        frozen = region in ("embeddings", 0)
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name


def test_batch_norm_statistics_stay_those_of_pretraining() -> None:
    model = zoo.build("hybrid, batch norm")
    selection = zoo.everything(model)
    apply_selection(model, selection)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    before = [(norm.running_mean.clone(), norm.num_batches_tracked.clone()) for norm in norms]
    _backward(forward(model, zoo.images(model), selection)[0])
    for norm, (mean, batches) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.num_batches_tracked, batches)
        assert norm.weight.grad is not None


def test_a_hook_is_gone_even_when_a_block_fails() -> None:
    model = zoo.build("layer scale, drop path")

    def fail(_module: nn.Module, _inputs: object) -> None:
        raise MemoryError("no more")

    handle = model.blocks[1].mlp.register_forward_pre_hook(fail)
    selection = Selection((True,) * 4, (16, 12, 9, 8))
    with pytest.raises(MemoryError):
        forward(model, zoo.images(model), selection)
    handle.remove()
    assert zoo.hooks(model) == 0


@pytest.mark.parametrize("name", ["deit_tiny", "dinov2 with registers"])
def test_a_batch_of_one_and_a_single_token_left_work(name: str) -> None:
    model = zoo.build(name)
    tokens = (model.patch_embed.num_patches,) + (1,) * (zoo.depth(model) - 1)
    selection = Selection((True,) * zoo.depth(model), tokens)
    apply_selection(model, selection)
    logits, deltas = forward(model, zoo.images(model, batch=1), selection, with_deltas=True)
    _backward(logits)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(delta) for delta in deltas)


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_parameter_belongs_to_one_region_and_the_shape_counts_them_all(name: str) -> None:
    model = zoo.build(name)
    shape = shape_of(model, name)
    assert shape.parameters == sum(value.numel() for value in model.parameters())
    assert shape.largest_parameter == max(value.numel() for value in model.parameters())
    head = {key.split(".")[0] for region, key, _ in named_regions(model) if region == "head"}
    assert head <= {"norm", "fc_norm", "head", "head_dist", "attn_pool"}
    assert shape.all_tokens == embed(model, zoo.images(model, batch=1)).shape[1]
    assert shape.image_px == tuple(model.patch_embed.img_size)


def test_regions_are_told_by_name() -> None:
    assert region_of("blocks.11.mlp.fc1.weight") == 11
    for name in ("pos_embed", "cls_token", "reg_token", "dist_token", "patch_embed.proj.weight", "norm_pre.weight"):
        assert region_of(name) == "embeddings"
    for name in ("norm.weight", "fc_norm.bias", "head.weight", "head_dist.bias", "attn_pool.latent"):
        assert region_of(name) == "head"


def test_alast_runs_on_what_has_a_class_token_to_read() -> None:
    for name in zoo.ADAPTIVE:
        assert adaptive_obstacle(shape_of(zoo.build(name), name)) is None
    obstacles = {name: adaptive_obstacle(shape_of(zoo.build(name), name)) or "" for name in zoo.OTHERS}
    assert "no class token" in obstacles["siglip"]
    assert "no class token" in obstacles["average, register"]
    assert "global_pool" in (adaptive_obstacle(shape_of(zoo.tiny(global_pool="avg"), "vit")) or "")
    assert "attn.qkv" in obstacles["parallel"]
    assert "attn.qkv" in obstacles["parallel things"]
    assert "attn.qkv" in obstacles["differential attention"]


class _Own(VisionTransformer):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x)


def _unsupported() -> Iterator[tuple[nn.Module, str]]:
    yield timm.create_model("resnet18"), "is a ResNet"
    yield timm.create_model("levit_128s"), "is a Levit"
    yield _Own(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3), "a way of its own"
    yield zoo.tiny(in_chans=1), "1 channels"


def test_another_architecture_is_refused_by_name() -> None:
    for model, reason in _unsupported():
        with pytest.raises(UnsupportedModel, match=reason) as refused:
            check_supported(model, "the-model")
        assert "the-model" in str(refused.value)
    model = zoo.tiny()
    assert check_supported(model, "vit") is model


def test_differential_attention_is_refused_because_its_memory_is_not_known() -> None:
    with pytest.raises(UnsupportedModel, match="differential attention"):
        check_supported(timm.create_model("vit_dlittle_patch16_reg1_gap_256"), "vit_dlittle_patch16_reg1_gap_256")
