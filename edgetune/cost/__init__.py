"""What one training step costs in bytes and FLOPs, from arithmetic alone. Pure: no torch, no numpy."""

from edgetune.cost.ends import input_bytes
from edgetune.cost.flops import block_forward_flops, full_fine_tuning_flops, prefix_flops, step_flops, token_share
from edgetune.cost.step import (
    StepSetup,
    evaluation_peak_bytes,
    feature_tokens,
    resident_weights_bytes,
    step_cost,
    step_peak_bytes,
)
from edgetune.cost.tape import FLOAT_BYTES, plain_saved_floats
from edgetune.cost.values import (
    BlockState,
    Recompute,
    Selection,
    StepCost,
    TokenScore,
    ViTShape,
    all_tokens_kept,
    block_states,
)
from edgetune.cost.weights import optimizer_bytes, trained_parameters, update_scratch_bytes

__all__ = [
    "FLOAT_BYTES",
    "BlockState",
    "Recompute",
    "Selection",
    "StepCost",
    "StepSetup",
    "TokenScore",
    "ViTShape",
    "all_tokens_kept",
    "block_forward_flops",
    "block_states",
    "evaluation_peak_bytes",
    "feature_tokens",
    "full_fine_tuning_flops",
    "input_bytes",
    "optimizer_bytes",
    "plain_saved_floats",
    "prefix_flops",
    "resident_weights_bytes",
    "step_cost",
    "step_flops",
    "step_peak_bytes",
    "token_share",
    "trained_parameters",
    "update_scratch_bytes",
]
