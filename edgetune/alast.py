"""ALaST: class-token deltas -> budgets -> what the next step trains and keeps. Pure, no torch, no numpy.

Source: "Adaptive Layer Selection for Efficient Vision Transformer Fine-Tuning", arXiv 2408.08670. What the paper leaves
open is decided in `docs/decisions/0003-alast.md`; each choice is a field of `AlastSettings`.

The rule: block l's budget rises with the change of its class-token delta between two steps,
`b[l] <- clip(b[l] + alpha * (delta[l] now - delta[l] before), floor, 1)`; K blocks are drawn without replacement from
softmax(budgets); a block keeps a share b[l] of the patch tokens it was given. Budgets used in a step are those of the
step before, because a step must be known before it runs.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

from edgetune.cost import Selection


class AlastSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The choices that the paper leaves open, at edgetune's defaults."""

    initial_budget: float = 0.9
    # None: learning rate x effective batch, which is the paper's sum over the batch at that batch size.
    alpha: float | None = None
    layer_choice: Literal["multinomial", "top"] = "multinomial"
    # "compound": a share of the tokens that are left; "absolute": a share of all tokens.
    token_share: Literal["compound", "absolute"] = "compound"


class AlastState(msgspec.Struct):
    """What ALaST remembers between steps (the only mutable value of the design)."""

    budgets: list[float]
    last_deltas: list[float] | None = None


def initial_state(depth: int, floor: float, settings: AlastSettings) -> AlastState:
    return AlastState([min(1.0, max(floor, settings.initial_budget))] * depth)


def update(state: AlastState, deltas: list[float], *, alpha: float, floor: float) -> None:
    """Move the budgets by this step's class-token deltas (mean over the batch). A delta that is no number moves nothing.

    Raises: ValueError if there are not as many deltas as blocks.
    """
    if len(deltas) != len(state.budgets):
        raise ValueError(f"{len(deltas)} deltas for {len(state.budgets)} blocks")
    before = state.last_deltas
    if not all(math.isfinite(delta) for delta in deltas):
        return
    if before is not None:
        state.budgets = [
            min(1.0, max(floor, budget + alpha * (now - then)))
            for budget, now, then in zip(state.budgets, deltas, before, strict=True)
        ]
    state.last_deltas = list(deltas)


def draw_blocks(
    budgets: list[float], split_block: int, count: int, choice: Literal["multinomial", "top"], rng: random.Random
) -> tuple[bool, ...]:
    """`count` of the blocks from `split_block` on, without replacement, with probability softmax(budgets)."""
    candidates = list(range(split_block, len(budgets)))
    count = min(count, len(candidates))
    if choice == "top":
        chosen = sorted(candidates, key=lambda block: (-budgets[block], block))[:count]
    else:
        weights = {block: math.exp(budgets[block]) for block in candidates}
        chosen = []
        for _ in range(count):
            block = rng.choices(list(weights), list(weights.values()))[0]
            del weights[block]
            chosen.append(block)
    return tuple(block in chosen for block in range(len(budgets)))


def keep_tokens(
    budgets: list[float],
    patch_tokens: int,
    split_block: int,
    share: Literal["compound", "absolute"],
    split_tokens: int | None = None,
) -> tuple[int, ...]:
    """Patch tokens that each block sees. Dropped tokens do not come back; after the last block nothing is dropped.

    Blocks below the split keep all: pruning inside the frozen prefix cost 5-7 points on a hard task (ALAST notes in
    `docs/decisions/0003-alast.md`), pruning above it one. `split_tokens` of them go on at the split, by default all. At
    split 0 this is the published rule.
    """
    entering = patch_tokens if split_tokens is None else split_tokens
    counts = [patch_tokens] * split_block + [entering]
    for budget in budgets[split_block:-1]:
        base = counts[-1] if share == "compound" else entering
        counts.append(max(1, min(counts[-1], round(base * budget))))
    return tuple(counts[: len(budgets)])


def propose(
    state: AlastState,
    *,
    patch_tokens: int,
    split_block: int,
    count: int,
    settings: AlastSettings,
    rng: random.Random,
    split_tokens: int | None = None,
    embeddings_train: bool = False,
) -> Selection:
    """The step that the budgets ask for; `planner.fit` clips it to the plan."""
    trains = draw_blocks(state.budgets, split_block, count, settings.layer_choice, rng)
    tokens = keep_tokens(state.budgets, patch_tokens, split_block, settings.token_share, split_tokens)
    return Selection(trains, tokens, embeddings_train)


def step_rng(seed: int, step: int) -> random.Random:
    """The randomness of one step: a function of seed and step alone, so resuming needs no generator state."""
    return random.Random(f"edgetune alast {seed} {step}")
