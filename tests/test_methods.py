"""What each method lets the planner choose from, and how it chooses a step."""

from __future__ import annotations

import random
from typing import Any, get_args

import msgspec
import pytest
from shapes import make_shape

from edgetune.alast import AlastSettings, AlastState, initial_state
from edgetune.cost import Selection
from edgetune.errors import UnsupportedModel, UsageError
from edgetune.methods import EMBEDDINGS, METHODS, adaptive_obstacle, check_model, default_rate, proposer, space_of
from edgetune.optim import OptimizerName
from edgetune.planner import MethodSpace, Plan, PlanRequest, plan
from edgetune.units import MIB

DEPTH = 12
SHAPE = make_shape(depth=DEPTH)


def _space(method: str, trained_blocks: int | None = None, split_block: int | None = None) -> MethodSpace:
    return space_of(METHODS[method], SHAPE, trained_blocks=trained_blocks, split_block=split_block)


def _plan(method: str, cap_mib: float = 100_000, **options: Any) -> Plan:
    request = PlanRequest(
        shape=SHAPE, space=_space(method, **options), batch_size=8, optimizer="adamw",
        cap_bytes=int(cap_mib * MIB), runtime_bytes=0,
    )  # fmt: skip
    return plan(request)


def test_full_trains_everything_and_leaves_nothing_to_choose() -> None:
    space = _space("full")
    assert (space.splits, space.trained_blocks) == ((0,), {0: (DEPTH,)})
    assert space.embeddings == (True, False)  # frozen where memory binds
    assert not space.draws
    assert not space.prunes_tokens


def test_head_trains_no_block() -> None:
    space = _space("head")
    assert (space.splits, space.trained_blocks, space.embeddings) == ((DEPTH,), {DEPTH: (0,)}, (False,))


def test_embeddings_train_or_freeze_as_asked() -> None:
    full = METHODS["full"]
    asked = {
        choice: space_of(full, SHAPE, trained_blocks=None, split_block=None, embeddings=choice).embeddings
        for choice in EMBEDDINGS
    }
    assert asked == {"auto": (True, False), "train": (True,), "freeze": (False,)}
    for name in ("head", "last-k", "random-k", "alast"):
        assert _space(name).embeddings == (False,)
    for name in ("random-k", "alast"):
        space = space_of(METHODS[name], SHAPE, trained_blocks=None, split_block=None, embeddings="train")
        assert (space.embeddings, space.splits) == ((True,), (0,))
        with pytest.raises(UsageError, match="with --split 3 nothing below that block trains"):
            space_of(METHODS[name], SHAPE, trained_blocks=None, split_block=3, embeddings="train")
    for name in ("head", "last-k"):
        with pytest.raises(UsageError, match=f"--embeddings train: --method {name} leaves them frozen"):
            space_of(METHODS[name], SHAPE, trained_blocks=None, split_block=None, embeddings="train")


def test_last_k_prefers_a_third_and_goes_down_to_one() -> None:
    space = _space("last-k")
    assert space.splits == (8, 9, 10, 11)
    assert all(space.trained_blocks[split] == (DEPTH - split,) for split in space.splits)


@pytest.mark.parametrize(
    "options", [{"trained_blocks": 5}, {"split_block": 7}, {"trained_blocks": 5, "split_block": 7}]
)
def test_last_k_takes_the_asked_number_only(options: dict[str, int]) -> None:
    space = _space("last-k", **options)
    assert (space.splits, space.trained_blocks) == ((7,), {7: (5,)})


@pytest.mark.parametrize("method", ["alast", "random-k"])
def test_drawing_methods_train_up_to_three_quarters_of_the_depth_down_to_half_of_what_is_above_the_split(
    method: str,
) -> None:
    space = _space(method)
    assert space.draws
    assert space.splits == tuple(range(DEPTH))
    assert space.trained_blocks[0] == (9, 8, 7, 6)
    assert space.trained_blocks[4] == (8, 7, 6, 5, 4)
    assert space.trained_blocks[8] == (4, 3, 2)
    assert space.trained_blocks[11] == (1,)
    assert all(
        max(counts) <= DEPTH - split and list(counts) == sorted(counts, reverse=True)
        for split, counts in space.trained_blocks.items()
    )


def test_only_alast_prunes_tokens() -> None:
    assert [name for name in METHODS if _space(name).prunes_tokens] == ["alast"]


def test_the_asked_k_and_split_are_kept() -> None:
    assert _space("alast", trained_blocks=5).splits == tuple(range(8))
    assert set(_space("alast", trained_blocks=5).trained_blocks.values()) == {(5,)}
    assert _space("random-k", split_block=6).splits == (6,)
    both = _space("alast", trained_blocks=2, split_block=10)
    assert (both.splits, both.trained_blocks) == ((10,), {10: (2,)})


@pytest.mark.parametrize(
    ("method", "trained_blocks", "split_block", "message"),
    [
        ("alast", 0, None, "--trained-blocks must be between 1 and 12"),
        ("alast", 13, None, "--trained-blocks must be between 1 and 12"),
        ("last-k", -1, None, "--trained-blocks must be between 1 and 12"),
        ("alast", None, -1, "between 0 and 11"),
        ("alast", None, 12, "between 0 and 11, not 12. The head alone is trained by --method head."),
        ("random-k", 5, 8, "more than the 4 blocks above --split 8"),
        ("last-k", 3, 8, "last-k trains all 4 blocks above"),
        ("full", 3, None, "mean nothing to --method full"),
        ("full", None, 3, "mean nothing to --method full"),
        ("head", 1, None, "mean nothing to --method head"),
    ],
)
def test_a_k_or_split_that_does_not_exist_is_refused(
    method: str, trained_blocks: int | None, split_block: int | None, message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        _space(method, trained_blocks, split_block)
    assert message in str(refused.value)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_a_plan_for_a_shallow_model(method: str, depth: int) -> None:
    space = space_of(METHODS[method], make_shape(depth=depth), trained_blocks=None, split_block=None)
    assert space.splits
    for split in space.splits:
        assert space.trained_blocks[split]
        assert all(0 <= count <= depth - split for count in space.trained_blocks[split])


def test_a_model_that_alast_cannot_train_is_refused_with_what_works() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"ALaST can't train vit: it has no class token.*full, head, last-k, random-k"
    ):
        check_model(METHODS["alast"], SHAPE, "it has no class token")
    check_model(METHODS["alast"], SHAPE, None)
    for name in ("full", "head", "last-k", "random-k"):
        check_model(METHODS[name], SHAPE, "it has no class token")


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ({"class_token": False}, "no class token"),
        ({"token_pool": False}, "does not read the class token"),
        ({"fused_qkv": False}, "attn.qkv"),
    ],
)
def test_what_a_model_lacks_for_alast_is_named(lacks: dict[str, bool], words: str) -> None:
    assert adaptive_obstacle(SHAPE) is None
    assert words in (adaptive_obstacle(make_shape(**lacks)) or "")


def _steps(method: str, chosen: Plan, count: int = 50, state: AlastState | None = None) -> list[Selection]:
    propose = proposer(METHODS[method], chosen, state, AlastSettings())
    return [propose(random.Random(step)) for step in range(count)]


@pytest.mark.parametrize(
    ("method", "trained", "embeddings"),
    [("full", range(12), True), ("head", (), False), ("last-k", range(8, 12), False)],
)
def test_fixed_methods_train_the_same_blocks_each_step(method: str, trained: range, embeddings: bool) -> None:
    selections = set(_steps(method, _plan(method)))
    assert selections == {Selection(tuple(block in trained for block in range(12)), (196,) * 12, embeddings)}


def test_random_k_draws_anew_above_the_split_and_keeps_all_tokens() -> None:
    selections = _steps("random-k", _plan("random-k", trained_blocks=3, split_block=4))
    assert len(set(selections)) > 20
    assert all(sum(selection.trains) == 3 and not any(selection.trains[:4]) for selection in selections)
    assert {selection.tokens for selection in selections} == {(196,) * 12}


def test_alast_asks_for_what_its_budgets_say_now() -> None:
    chosen = _plan("alast", trained_blocks=2, split_block=9)
    state = initial_state(DEPTH, 0.5, AlastSettings())
    (before,) = _steps("alast", chosen, 1, state)
    assert before.tokens == (196,) * 10 + (176, 158)
    state.budgets = [0.5] * DEPTH
    (after,) = _steps("alast", chosen, 1, state)
    assert after.tokens == (196,) * 10 + (98, 49)
    assert sum(after.trains) == 2


def test_every_method_has_a_rate_for_every_optimizer() -> None:
    for method in METHODS.values():
        assert set(method.learning_rate) == set(get_args(OptimizerName)) == {"adamw", "momentum", "sgd", "adafactor"}
        assert all(0 < rate <= 1 for rate in method.learning_rate.values())
        assert method.help


def test_methods_are_values() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    with pytest.raises(AttributeError):
        METHODS["full"].name = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(METHODS["full"]) == METHODS["full"]


def test_adams_default_rate_falls_with_the_width() -> None:
    for name in ("full", "last-k", "random-k", "alast"):
        rate = METHODS[name].learning_rate["adamw"]
        assert default_rate(METHODS[name], "adamw", 96) == rate
        assert default_rate(METHODS[name], "adamw", 48) == rate
        assert default_rate(METHODS[name], "adamw", 384) == pytest.approx(rate / 4)
        assert default_rate(METHODS[name], "momentum", 384) == METHODS[name].learning_rate["momentum"]
    assert default_rate(METHODS["head"], "adamw", 384) == METHODS["head"].learning_rate["adamw"]
