"""The plan of a run under a cap, or `DoesNotFit` with the smallest cap that would do. Pure, no torch, no numpy.

`choices.py` writes down what the planner may choose and in which order, `search.py` finds the best of it, `ways.py` the
fastest way to run one choice, `worst.py` the worst draw; `phases.py` says what a whole process holds, `tokens.py` clips a
step to the plan, `prefix.py` says what is cached of what never trains, `setups.py` how steps are run, `lighter.py` gives it back what it has room for, `explain.py` puts the plan into words.
"""

from edgetune.planner.explain import format_cap
from edgetune.planner.lighter import lightened
from edgetune.planner.phases import parts_of, pass_batch, process_bytes
from edgetune.planner.prefix import entry_bytes, pinned, views_that_fit
from edgetune.planner.search import plan, replayed, smallest_cap_bytes
from edgetune.planner.tokens import ceilings, default_token_floor, fit, pruned_tokens, rounded_up
from edgetune.planner.values import (
    JUDGED_IMAGES,
    LEAST_LOOKED_AT,
    LEAST_PASSES,
    PLAN_FORMAT_VERSION,
    PREFETCHED_BATCHES,
    TOKEN_MULTIPLE,
    CachedPrefix,
    CacheRequest,
    EmbeddingsChoice,
    MethodSpace,
    Plan,
    PlanRequest,
    RecomputeChoice,
)

__all__ = [
    "JUDGED_IMAGES",
    "LEAST_LOOKED_AT",
    "LEAST_PASSES",
    "PLAN_FORMAT_VERSION",
    "PREFETCHED_BATCHES",
    "TOKEN_MULTIPLE",
    "CacheRequest",
    "CachedPrefix",
    "EmbeddingsChoice",
    "MethodSpace",
    "Plan",
    "PlanRequest",
    "RecomputeChoice",
    "ceilings",
    "default_token_floor",
    "entry_bytes",
    "fit",
    "format_cap",
    "lightened",
    "parts_of",
    "pass_batch",
    "pinned",
    "plan",
    "process_bytes",
    "pruned_tokens",
    "replayed",
    "rounded_up",
    "smallest_cap_bytes",
    "views_that_fit",
]
