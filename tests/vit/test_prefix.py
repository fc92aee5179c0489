"""What a frozen prefix puts out, read instead of computed: the same losses and gradients, bit for bit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import zoo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from edgetune.cost import Selection, TokenScore
from edgetune.vit.loop import apply_selection, at_end, forward, keep_tokens, look, prefix, prefix_whole_and_pruned

FAMILIES = list(zoo.ALL)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _last(model: VisionTransformer, blocks: int, *, split_tokens: int | None = None) -> Selection:
    """Only the last `blocks` blocks train; of the patch tokens so many enter them."""
    depth, tokens = zoo.depth(model), model.patch_embed.num_patches
    above = tokens if split_tokens is None else split_tokens
    below = depth - blocks
    return Selection((False,) * below + (True,) * blocks, (tokens,) * below + (above,) * blocks)


def _gradients(model: VisionTransformer) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def _step(
    model: VisionTransformer, inputs: Tensor, selection: Selection, cached_blocks: int
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # dropout above the prefix draws the same
    logits, deltas = forward(model, inputs, selection, with_deltas=model.has_class_token, cached_blocks=cached_blocks)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(inputs)) % zoo.CLASSES)
    loss.backward()
    assert len(deltas) == (zoo.depth(model) if model.has_class_token else 0)
    return loss.item(), _gradients(model)


def _tokens(selection: Selection, blocks: int) -> tuple[int, ...]:
    return (*selection.tokens[:blocks], selection.tokens[min(blocks, selection.depth - 1)])


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_with_a_cached_prefix_are_those_without(family: str) -> None:
    model = zoo.build(family)
    if any(type(module).__name__ == "DiffAttention" for module in model.modules()):
        pytest.skip("refused by name")
    blocks = zoo.depth(model) - 1
    selection = _last(model, 1)
    apply_selection(model, selection)
    images = zoo.images(model, batch=4)
    features = prefix(model, images, _tokens(selection, blocks), pooled=False)
    loss, gradients = _step(model, images, selection, 0)
    cached_loss, cached_gradients = _step(model, features, selection, blocks)
    assert cached_loss == loss
    assert _same(cached_gradients, gradients)


@pytest.mark.parametrize("family", ["deit_tiny", "dinov2 with registers", "clip", "q and k norm", "gated"])
def test_tokens_dropped_at_the_split_are_the_same_ones(family: str) -> None:
    model = zoo.build(family)
    blocks = zoo.depth(model) - 1
    selection = _last(model, 1, split_tokens=max(1, model.patch_embed.num_patches // 2))
    apply_selection(model, selection)
    images = zoo.images(model, batch=4)
    features = prefix(model, images, _tokens(selection, blocks), pooled=False)
    assert features.shape[1] == model.num_prefix_tokens + selection.tokens[-1]
    loss, gradients = _step(model, images, selection, 0)
    cached_loss, cached_gradients = _step(model, features, selection, blocks)
    assert cached_loss == loss
    assert _same(cached_gradients, gradients)


@pytest.mark.parametrize("family", ["deit_tiny", "dinov2 with registers", "q and k norm"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("score", ["attention", "distance"])
def test_one_pass_gives_what_two_give_on_all_tokens_and_on_fewer(family: str, blocks: int, score: TokenScore) -> None:
    model = zoo.build(family).eval()
    images, patches = zoo.images(model, batch=3), model.patch_embed.num_patches
    whole, pruned = prefix_whole_and_pruned(model, images, blocks, patches // 2, score)
    assert torch.equal(whole, prefix(model, images, (patches,) * (blocks + 1), pooled=False))
    assert torch.equal(pruned, prefix(model, images, (*(patches,) * blocks, patches // 2), pooled=False, score=score))


@pytest.mark.parametrize("family", ["deit_tiny", "dinov2 with registers", "siglip"])
def test_a_look_sees_what_the_prefix_and_the_rest_of_the_model_make_of_images(family: str) -> None:
    model = zoo.build(family).eval()
    images, patches, depth = zoo.images(model, batch=3), model.patch_embed.num_patches, zoo.depth(model)
    scored, half = family != "siglip", patches // 2
    found = look(model, images, [1, 2], scored=scored)

    def summary(blocks: int, leaving: int) -> Tensor:
        """Of what goes on from block 2."""
        tokens = prefix(model, images, ((patches,) * 3 + (leaving,) * depth)[: blocks + 1], pooled=False)
        mean = tokens[:, model.num_prefix_tokens :].mean(dim=1)
        return torch.cat((tokens[:, 0], mean), dim=1) if model.num_prefix_tokens else mean

    assert all(torch.equal(seen, summary(block, patches)) for block, seen in zip([1, 2], found.at_blocks, strict=True))
    assert torch.equal(found.tokens, prefix(model, images, (patches,) * 3, pooled=False))
    assert torch.equal(at_end(model, found.tokens, 2), summary(depth, patches))
    assert set(found.scores) == ({"attention", "distance"} if scored else set())
    for score, values in found.scores.items():
        pruned = prefix(model, images, (patches, patches, half), pooled=False, score=score)
        assert torch.equal(keep_tokens(found.tokens, values, half, model.num_prefix_tokens), pruned)


@pytest.mark.parametrize("family", ["deit_tiny", "deit3_small", "dinov2 with registers", "siglip"])
def test_what_a_prefix_puts_out_does_not_depend_on_the_micro_batch(family: str) -> None:
    model = zoo.build(family).eval()
    images = zoo.images(model, batch=7)
    tokens = (model.patch_embed.num_patches,) * zoo.depth(model)
    whole = prefix(model, images, tokens, pooled=False)
    for size in (1, 2, 3):
        parts = [prefix(model, part, tokens, pooled=False) for part in images.split(size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("family", ["deit_tiny", "dinov2 with registers", "clip", "distilled"])
def test_a_head_that_reads_the_class_token_needs_nothing_else_of_an_image(family: str) -> None:
    model = zoo.build(family)
    depth = zoo.depth(model)
    selection = _last(model, 0)
    apply_selection(model, selection)
    images = zoo.images(model, batch=4)
    pooled = prefix(model, images, _tokens(selection, depth), pooled=True)
    assert pooled.shape == (4, model.num_prefix_tokens, model.embed_dim)
    loss, gradients = _step(model, images, selection, 0)
    cached_loss, cached_gradients = _step(model, pooled, selection, depth)
    assert cached_loss == loss
    # The norm's own gradients are sums over all tokens, of which all but one add nothing: in another order.
    assert cached_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(cached_gradients[name], value, rtol=1e-5, atol=1e-7)


def test_a_prefix_keeps_nothing_for_a_backward() -> None:
    model = zoo.build("deit_tiny").train()
    assert not prefix(model, zoo.images(model), (36, 36, 36), pooled=False).requires_grad
