"""A part run on the meta device holds what arithmetic says of it where arithmetic knows it, and the model stays as it is.

How close whole steps of models that are not plain come is in test_cost_measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import zoo
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from edgetune.cost import BlockState, Recompute, Selection, StepSetup, ViTShape, step_peak_bytes
from edgetune.cost.blocks import block_walk, probed_walk
from edgetune.cost.ends import embed_walk, head_walk
from edgetune.cost.probed import Bytes, amounts, largest, most, total
from edgetune.cost.tape import Mode
from edgetune.errors import UnsupportedModel
from edgetune.vit.dimensions import CLASSES, IMAGES, LEAVING, TOKENS, Dimensions
from edgetune.vit.ledger import Ledger
from edgetune.vit.loop import embed, run_block
from edgetune.vit.probe import Stream, probe_block, probe_embed, probe_head
from edgetune.vit.shape import shape_of

MODES = [Mode(threads=2), Mode(accumulates=True), Mode(updates_in_backward=True, threads=2)]
PLAIN = {
    "plain": {},
    "layer scale": {"init_values": 1e-5},
    "q and k norm": {"qk_norm": True},
    "norm before": {"pre_norm": True},
}


def _plain(name: str) -> tuple[VisionTransformer, ViTShape]:
    with torch.device("meta"):
        model = VisionTransformer(img_size=224, embed_dim=192, num_heads=3, depth=2, num_classes=10, **PLAIN[name])
    shape = shape_of(model, name)
    assert (shape.probed_blocks, shape.probed_embed, shape.probed_head) == ((), None, None)
    return model, shape


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_block_that_is_probed_holds_what_the_walk_says(name: str) -> None:
    model, shape = _plain(name)
    part = probe_block(model.blocks[1], run_block, Stream(shape.width, shape.prefix_tokens), prunes=True, has_half=True)
    for state, level, leaving, lowest, mode in product(BlockState, Recompute, (None, 100), (False, True), MODES):
        trained = state is BlockState.TRAINED
        if not trained and (lowest or mode.gradients_way):
            continue
        for tokens, batch in ((120, 1), (196, 3), (800, 2)):
            walk = block_walk(shape, state, level, tokens, leaving, batch, lowest, mode)
            left = None if leaving is None else leaving + 1
            probed = probed_walk(part, state, level, tokens + 1, left, batch, lowest, mode)
            room = 0.003 * max(walk.forward_peak, walk.backward_peak)
            where = (state, level, leaving, lowest, mode, tokens, batch)
            assert walk == pytest.approx(probed, rel=0, abs=room), where


@pytest.mark.parametrize("name", PLAIN)
def test_plain_ends_that_are_probed_hold_what_the_walk_says(name: str) -> None:
    model, shape = _plain(name)
    parts = {
        "probed_embed": probe_embed(model, embed, shape.image_px),
        "probed_head": probe_head(model, Stream(shape.width, shape.prefix_tokens)),
    }
    probed = ViTShape(**{field: getattr(shape, field) for field in shape.__struct_fields__} | parts)
    for mode, batch, flag in product(MODES, (2, 5), (False, True)):
        for tokens in (10, 196):
            found, walked = (head_walk(each, tokens, batch, mode, inner=flag) for each in (probed, shape))
            assert found == pytest.approx(walked, rel=0.01, abs=200 * batch)
        found, walked = (embed_walk(each, batch, mode, keeps=flag) for each in (probed, shape))
        assert found[:3] == pytest.approx(walked[:3], rel=0.02)


@pytest.mark.parametrize("name", ["SwiGLU", "dropout", "hybrid, batch norm", "attention pooling, prefix included"])
def test_probing_changes_nothing_of_the_model(name: str) -> None:
    model = zoo.build(name)
    model.train()
    model.blocks[0].eval().requires_grad_(False)
    before = [(key, value.clone()) for key, value in model.state_dict().items()]
    flags = [module.training for module in model.modules()], [value.requires_grad for value in model.parameters()]
    drawn = torch.get_rng_state()
    shape_of(model, name)
    assert flags == (
        [module.training for module in model.modules()],
        [value.requires_grad for value in model.parameters()],
    )
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before)
    assert torch.equal(drawn, torch.get_rng_state())
    assert zoo.hooks(model) == 0


class _Reads(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * float(tokens.mean())


def test_a_part_that_needs_values_to_run_is_refused() -> None:
    model = zoo.tiny(drop_path_rate=0.3)
    model.blocks[2].ls1 = _Reads()
    with pytest.raises(UnsupportedModel, match="can't foresee what it takes"):
        shape_of(model, "vit")


def test_probing_imports_nothing() -> None:
    """Above all not torch._dynamo. Whatever timm itself imports is there before."""
    code = """
import json, sys
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from edgetune.vit.shape import shape_of

with torch.device("meta"):
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_layer=SwiGLU)
before = set(sys.modules)
assert shape_of(model, "vit").probed_blocks
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    # Where torchvision has not imported it already, torch's wrapper of a mode's method would.
    assert not hasattr(Ledger.__torch_dispatch__, "__wrapped__")


def test_the_shape_does_not_depend_on_where_the_model_is() -> None:
    model = zoo.tiny(mlp_layer=zoo.SwiGLU)
    with torch.device("meta"):
        empty = zoo.tiny(mlp_layer=zoo.SwiGLU)
    assert shape_of(model, "vit") == shape_of(empty, "vit")


def test_blocks_that_are_built_otherwise_are_of_another_kind() -> None:
    # The first block's drop path is none.
    shape = shape_of(zoo.tiny(drop_path_rate=0.3), "vit")
    assert shape.block_kinds == (0, 1, 1, 1)
    assert len(shape.probed_blocks) == 2
    kept = [
        probed_walk(part, BlockState.TRAINED, Recompute.NOTHING, 17, None, 2, False, Mode()).kept
        for part in shape.probed_blocks
    ]
    assert kept[0] < kept[1]
    assert shape_of(zoo.tiny(mlp_layer=zoo.SwiGLU), "vit").block_kinds == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (48, Bytes(once=48)),
        (IMAGES * 12, Bytes(image=12)),
        (IMAGES * TOKENS * 8, Bytes(token=8)),
        (IMAGES * (TOKENS - 1) * 8, Bytes(token=8, image=-8)),
        (IMAGES * LEAVING * 8, Bytes(leaving=8)),
        (IMAGES * (LEAVING - 1) * 8, Bytes(leaving=8, image=-8)),
        (IMAGES * TOKENS * TOKENS * 12, Bytes(pair=12)),
        (CLASSES * 192 * 4, Bytes(classes=768)),
        (IMAGES * CLASSES * 4, Bytes(logits=4)),
    ],
)
def test_a_size_says_by_its_factors_what_it_grows_with(size: int, found: Bytes) -> None:
    assert Dimensions(prefix_tokens=1).bytes_of(size) == found


@given(
    st.lists(st.tuples(*[st.integers(-50, 50)] * len(Bytes._fields)).map(Bytes._make), min_size=1, max_size=12),
    st.tuples(st.integers(1, 20), st.integers(1, 900), st.integers(1, 900), st.integers(1, 1000), st.integers(1, 8)),
)
def test_dropping_what_is_never_the_largest_drops_no_peak(found: list[Bytes], counts: tuple[int, ...]) -> None:
    batch, tokens, leaving, classes, threads = counts
    of = amounts(batch, tokens, min(tokens, leaving), classes, threads)
    assert most(largest(found), of) == max(total(each, of) for each in found)


@cache
def _shape(name: str) -> ViTShape:
    return shape_of(zoo.build(name), name)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", ["SwiGLU", "dropout", "layer scale, drop path", "norm after"])
def test_a_smaller_step_of_a_probed_model_never_costs_more(name: str, data: st.DataObject) -> None:
    shape = _shape(name)
    depth, all_tokens = shape.depth, shape.patch_tokens
    flags = st.lists(st.booleans(), min_size=depth, max_size=depth)
    counts = st.lists(st.integers(1, all_tokens), min_size=depth - 1, max_size=depth - 1)
    more_trains, mask = data.draw(flags), data.draw(flags)
    more_tokens, others = (sorted(data.draw(counts), reverse=True) for _ in range(2))
    known = list(Recompute) if shape.mlp_half else [Recompute.NOTHING, Recompute.BLOCK]
    levels = tuple(data.draw(st.lists(st.sampled_from(known), min_size=depth, max_size=depth)))
    embeddings, kept = data.draw(st.booleans()), data.draw(st.booleans())
    more = Selection(tuple(more_trains), (all_tokens, *more_tokens), embeddings, levels)
    fewer = Selection(
        tuple(one and other for one, other in zip(more_trains, mask, strict=True)),
        (all_tokens, *map(min, zip(more_tokens, others, strict=True))),
        embeddings and kept,
        levels,
    )
    accumulation, batch = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6))
    setup = StepSetup(
        micro_batch=batch, accumulation=accumulation, optimizer="adamw", ever_trained_blocks=depth, may_prune=True
    )
    assert step_peak_bytes(shape, fewer, setup) <= step_peak_bytes(shape, more, setup)
    larger = msgspec.structs.replace(setup, micro_batch=batch + 1)
    assert step_peak_bytes(shape, more, setup) <= step_peak_bytes(shape, more, larger)
