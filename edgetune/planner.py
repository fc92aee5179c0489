"""The plan of a run under a cap, or `DoesNotFit` with the smallest cap that would do. Pure, no torch, no numpy.

The space, in order of preference (the first that fits wins):

1. the lowest split block: more blocks may ever train, and accuracy on hard tasks falls with the split;
2. the most blocks a step (K, down to half of those above the split): fewer trained blocks learn slower;
3. the highest token ceilings, from nothing pruned down to the token floor;
4. the largest micro-batch: it changes no result, only speed.

So the lossless lever (micro-batches) is spent before a lossy one moves. Prediction of a process's peak is the live peak
of `cost.step_cost` for the worst draw at the ceilings, plus what data and the allocator add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from edgetune import cost
from edgetune.cost import Selection, StepCost, ViTShape
from edgetune.errors import DoesNotFit, UsageError
from edgetune.optim import OptimizerName
from edgetune.units import MIB, format_bytes

# What a run's process holds beyond live tensors: a share (blocks the allocator keeps, alignment) and a fixed part
# (Python objects, code paged in by kernels the warm-up did not meet, report). Measured by `benchmarks/memory_plan.py`.
ALLOCATOR_SHARE = 0.04
PROCESS_BYTES = 20 * MIB
# Micro-batches that exist beside the one being computed: one being loaded, one waiting.
PREFETCHED_BATCHES = 2
MAX_EVALUATION_BATCH = 64
# At the floor of every block, at least this share of the patch tokens reaches the last block (see docs/decisions).
LAST_BLOCK_TOKEN_SHARE = 0.25
CEILING_STEPS = 6
TOKEN_MULTIPLE = 8


class MethodSpace(msgspec.Struct, frozen=True, kw_only=True):
    """What a method lets the planner choose from. `methods.py` makes one for each method."""

    name: str
    splits: tuple[int, ...]
    # K for each split, best first.
    trained_blocks: dict[int, tuple[int, ...]]
    embeddings_train: bool = False
    prunes_tokens: bool = False
    # Blocks are drawn anew each step from those above the split (else the top K train throughout).
    draws: bool = False


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a plan is a function of."""

    shape: ViTShape
    space: MethodSpace
    batch_size: int
    optimizer: OptimizerName
    cap_bytes: int
    runtime_bytes: int
    token_floor: float | None = None
    accumulation: int | None = None  # asked for by the user; None: the planner's choice
    decode_bytes: int = 0  # the largest image's decoding
    threads: int = 1
    peak_flops_per_s: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run may do. Every step's selection is clipped to it, so the prediction bounds every step."""

    format_version: int = 1
    model: str
    method: str
    optimizer: OptimizerName
    split_block: int
    trained_blocks: int
    ever_trained_blocks: int
    embeddings_train: bool
    draws: bool
    token_ceiling: tuple[int, ...]
    token_floor: float
    batch_size: int
    micro_batch: int
    accumulation: int
    evaluation_batch: int
    threads: int
    cap_bytes: int
    runtime_bytes: int
    predicted: StepCost
    predicted_peak_bytes: int
    predicted_phase_bytes: dict[str, int]
    predicted_step_seconds: float | None
    explanation: tuple[str, ...]


class _Candidate(msgspec.Struct, frozen=True):
    split_block: int
    trained_blocks: int
    token_ceiling: tuple[int, ...]


def plan(request: PlanRequest, smaller_models: Iterable[ViTShape] = ()) -> Plan:
    """The most preferred plan whose predicted peak is at most the cap.

    Raises: DoesNotFit, naming the smallest cap for this method, batch and floor, and the first of `smaller_models`
    (largest first) that fits the cap; UsageError for a batch or a floor that makes no sense.
    """
    _check(request)
    refused: tuple[_Candidate, int, int] | None = None  # the last candidate that did not fit, and its bytes
    for candidate in _candidates(request):
        sizes = _micro_batches(request)
        smallest, size = _smallest_peak(request, candidate)
        if smallest > request.cap_bytes:
            refused = (candidate, size, smallest)
            continue
        for micro_batch in sizes:
            peak = predicted_peak_bytes(request, candidate, micro_batch)
            if peak <= request.cap_bytes:
                return _finish(request, candidate, micro_batch, peak, refused)
            refused = (candidate, micro_batch, peak)
    smallest_cap = smallest_cap_bytes(request)
    raise DoesNotFit(_does_not_fit(request, smallest_cap, smaller_models), smallest_cap)


def smallest_cap_bytes(request: PlanRequest) -> int:
    """The least cap under which this method, batch and floor have a plan."""
    return min(_smallest_peak(request, candidate)[0] for candidate in _candidates(request))


def _smallest_peak(request: PlanRequest, candidate: _Candidate) -> tuple[int, int]:
    """The least predicted peak over all micro-batches, and the micro-batch that has it.

    Smaller is less, but for one case: the whole batch at once holds no gradients of earlier micro-batches.
    """
    sizes = _micro_batches(request)
    return min((predicted_peak_bytes(request, candidate, size), size) for size in {sizes[0], sizes[-1]})


def replayed(plan: Plan, *, cap_bytes: int, runtime_bytes: int) -> Plan:
    """Another run's plan under this run's cap and runtime: what training adds stays as it was predicted.

    Raises: DoesNotFit if that passes the cap.
    """
    shift = runtime_bytes - plan.runtime_bytes
    peak = plan.predicted_peak_bytes + shift
    if peak > cap_bytes:
        raise DoesNotFit(
            f"the plan needs {format_cap(peak)} here; the cap is {format_cap(cap_bytes)} (of which the runtime takes "
            f"{format_bytes(runtime_bytes)}). Try --ram-cap {format_cap(peak)}, or leave --plan out.",
            peak,
        )
    return msgspec.structs.replace(
        plan,
        cap_bytes=cap_bytes,
        runtime_bytes=runtime_bytes,
        predicted_peak_bytes=peak,
        predicted_phase_bytes={phase: size + shift for phase, size in plan.predicted_phase_bytes.items()},
    )


def parts_of(plan: Plan) -> dict[str, int]:
    """What each kind holds at its own largest, bytes. They are not all at their largest at once: the peak is less."""
    step = plan.predicted
    return {
        "runtime": plan.runtime_bytes,
        "weights": step.weights_bytes,
        "gradients": step.gradients_bytes,
        "optimizer": step.optimizer_bytes,
        "activations": step.activations_bytes,
        "workspace": step.workspace_bytes,
        "inputs": step.inputs_bytes * (1 + PREFETCHED_BATCHES),
        "margin": PROCESS_BYTES + round(ALLOCATOR_SHARE * step.peak_bytes),
    }


def fit(selection: Selection, plan: Plan) -> Selection:
    """Clip a proposal to the plan: no block below the split, at most K of them, no more tokens than the ceilings.

    Token counts go up to a multiple of TOKEN_MULTIPLE, so that a run meets few shapes: for each new one the allocator and
    oneDNN keep memory for good (16 MiB in 90 steps of the bundled model).
    """
    room = plan.trained_blocks
    trains = []
    for block, trained in enumerate(selection.trains):
        allowed = trained and block >= plan.split_block and room > 0
        room -= allowed
        trains.append(allowed)
    tokens: list[int] = []
    for asked, ceiling in zip(selection.tokens, plan.token_ceiling, strict=True):
        tokens.append(max(1, min(_rounded_up(asked), ceiling, tokens[-1] if tokens else ceiling)))
    return Selection(tuple(trains), tuple(tokens), plan.embeddings_train and selection.embeddings_train)


def worst_draws(depth: int, split_block: int, count: int, tokens: tuple[int, ...], embeddings: bool) -> list[Selection]:
    """Draws of which one has the largest peak among all draws of `count` blocks above the split.

    A trained block saves more the lower it stands (it sees more tokens), and adds its gradients to whatever peaks below
    it, wherever it stands. So for a peak at any block, the worst draw trains some of the blocks above it, say the top
    ones, and of those up to it the lowest, from the split on: it is one of these.
    """
    if count == 0:
        return [Selection((False,) * depth, tokens, embeddings)]
    draws = []
    for high in range(count):
        low = split_block + count - high
        trains = tuple(split_block <= block < low or block >= depth - high for block in range(depth))
        draws.append(Selection(trains, tokens, embeddings))
    return draws


def ceilings(shape: ViTShape, split_block: int, keep_ratio: float) -> tuple[int, ...]:
    """Most patch tokens a block: all up to the split block, then a share `keep_ratio` of what is left.

    Each count goes up to a multiple of TOKEN_MULTIPLE.
    """
    left = float(shape.patch_tokens)
    counts = [shape.patch_tokens] * min(split_block + 1, shape.depth)
    while len(counts) < shape.depth:
        left *= keep_ratio
        counts.append(min(counts[-1], _rounded_up(left)))
    return tuple(counts)


def _rounded_up(tokens: float) -> int:
    # 1e-9: a ratio like 0.9 must not push a whole number over the next multiple.
    return TOKEN_MULTIPLE * max(1, -int(-(tokens - 1e-9) // TOKEN_MULTIPLE))


def default_token_floor(depth: int, split_block: int) -> float:
    """The least budget of a block: LAST_BLOCK_TOKEN_SHARE of the tokens are left where all blocks are at it."""
    prunings = max(1, depth - 1 - split_block)
    floor: float = max(0.5, LAST_BLOCK_TOKEN_SHARE ** (1 / prunings))
    return round(floor, 4)


def predicted_peak_bytes(request: PlanRequest, candidate: _Candidate, micro_batch: int) -> int:
    """Peak RSS plus swap of the whole process on the device, over all phases."""
    return max(_phases(request, _worst_cost(request, candidate, micro_batch), micro_batch).values())


def _worst_cost(request: PlanRequest, candidate: _Candidate, micro_batch: int) -> StepCost:
    shape, space = request.shape, request.space
    draws = worst_draws(
        shape.depth, candidate.split_block, candidate.trained_blocks, candidate.token_ceiling, space.embeddings_train
    )
    if not space.draws:
        draws = draws[:1]
    accumulation = -(-request.batch_size // micro_batch)
    ever = shape.depth - candidate.split_block if space.draws else candidate.trained_blocks
    return max(
        (
            cost.step_cost(
                shape,
                draw,
                micro_batch=micro_batch,
                accumulation=accumulation,
                optimizer=request.optimizer,
                ever_trained_blocks=ever,
            )
            for draw in draws
        ),
        key=lambda step: step.peak_bytes,
    )


def _phases(request: PlanRequest, step: StepCost, micro_batch: int) -> dict[str, int]:
    """Predicted peak of the process in each phase."""
    shape = request.shape
    prefetched = PREFETCHED_BATCHES * cost.input_bytes(shape, micro_batch) + request.decode_bytes
    resting = step.weights_bytes + step.optimizer_bytes
    evaluated = _evaluation_batch(request, step, micro_batch)
    evaluation = resting + cost.evaluation_peak_bytes(shape, evaluated)
    evaluation += PREFETCHED_BATCHES * cost.input_bytes(shape, evaluated) + request.decode_bytes
    live = {
        # The model as built, beside the weights read from a file.
        "load": 2 * step.weights_bytes,
        "train": step.peak_bytes + prefetched,
        "evaluate": evaluation,
        "save": resting + shape.largest_parameter * cost.FLOAT_BYTES,
    }
    return {
        phase: request.runtime_bytes + PROCESS_BYTES + round(size * (1 + ALLOCATOR_SHARE))
        for phase, size in live.items()
    }


def _evaluation_batch(request: PlanRequest, step: StepCost, micro_batch: int) -> int:
    """The largest power of two whose evaluation stays under what training needs anyway."""
    shape = request.shape
    training = step.peak_bytes + PREFETCHED_BATCHES * cost.input_bytes(shape, micro_batch)
    batch = MAX_EVALUATION_BATCH
    while batch > 1:
        inputs = PREFETCHED_BATCHES * cost.input_bytes(shape, batch)
        needed = step.weights_bytes + step.optimizer_bytes + cost.evaluation_peak_bytes(shape, batch) + inputs
        if needed <= training:
            break
        batch //= 2
    return batch


def _candidates(request: PlanRequest) -> Iterator[_Candidate]:
    shape, space = request.shape, request.space
    for split_block in space.splits:
        floor = _floor(request, split_block)
        ratios = [1.0]
        if space.prunes_tokens and floor < 1:
            ratios += [1 - (1 - floor) * step / CEILING_STEPS for step in range(1, CEILING_STEPS + 1)]
        for trained_blocks in space.trained_blocks[split_block]:
            for ratio in ratios:
                yield _Candidate(split_block, trained_blocks, ceilings(shape, split_block, ratio))


def _floor(request: PlanRequest, split_block: int) -> float:
    if not request.space.prunes_tokens:
        return 1.0
    if request.token_floor is not None:
        return request.token_floor
    return default_token_floor(request.shape.depth, split_block)


def _micro_batches(request: PlanRequest) -> list[int]:
    """Micro-batch sizes, largest first: the batch cut into 1, 2, 3 ... nearly equal parts."""
    if request.accumulation is not None:
        return [-(-request.batch_size // request.accumulation)]
    parts = range(1, request.batch_size + 1)
    return sorted({-(-request.batch_size // count) for count in parts}, reverse=True)


def _check(request: PlanRequest) -> None:
    if request.batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {request.batch_size}.")
    if request.accumulation is not None and not 1 <= request.accumulation <= request.batch_size:
        raise UsageError(
            f"--grad-accum-steps must be between 1 and the batch size {request.batch_size}, not {request.accumulation}."
        )
    if request.token_floor is not None and not 0 < request.token_floor <= 1:
        raise UsageError(f"the token floor is a share above 0 and up to 1, not {request.token_floor}.")


def _finish(
    request: PlanRequest,
    candidate: _Candidate,
    micro_batch: int,
    peak: int,
    refused: tuple[_Candidate, int, int] | None,
) -> Plan:
    shape, space = request.shape, request.space
    step = _worst_cost(request, candidate, micro_batch)
    return Plan(
        model=shape.name,
        method=space.name,
        optimizer=request.optimizer,
        split_block=candidate.split_block,
        trained_blocks=candidate.trained_blocks,
        ever_trained_blocks=shape.depth - candidate.split_block if space.draws else candidate.trained_blocks,
        embeddings_train=space.embeddings_train,
        draws=space.draws,
        token_ceiling=candidate.token_ceiling,
        token_floor=_floor(request, candidate.split_block),
        batch_size=request.batch_size,
        micro_batch=micro_batch,
        accumulation=-(-request.batch_size // micro_batch),
        evaluation_batch=_evaluation_batch(request, step, micro_batch),
        threads=request.threads,
        cap_bytes=request.cap_bytes,
        runtime_bytes=request.runtime_bytes,
        predicted=step,
        predicted_peak_bytes=peak,
        predicted_phase_bytes=_phases(request, step, micro_batch),
        predicted_step_seconds=step.flops / request.peak_flops_per_s if request.peak_flops_per_s else None,
        explanation=_explain(request, candidate, micro_batch, peak, refused),
    )


def _explain(
    request: PlanRequest,
    candidate: _Candidate,
    micro_batch: int,
    peak: int,
    refused: tuple[_Candidate, int, int] | None,
) -> tuple[str, ...]:
    """What was chosen and which limit bound, in words."""
    shape, space = request.shape, request.space
    budget = request.cap_bytes - request.runtime_bytes
    lines = [
        f"cap {format_bytes(request.cap_bytes)}; runtime {format_bytes(request.runtime_bytes)}; "
        f"{format_bytes(budget)} left for training; predicted peak {format_bytes(peak)}"
    ]
    if refused is None:
        lines.append("memory does not bind: the method runs as it likes best")
    else:
        lines.append(
            f"memory binds: the next larger plan ({_describe(request, refused[0], refused[1])}) "
            f"needs {format_bytes(refused[2])}"
        )
    what = _describe(request, candidate, micro_batch)
    if space.prunes_tokens:
        floor = _floor(request, candidate.split_block)
        what += f"; a block keeps at least {floor:.0%} of the patch tokens it is given"
    lines.append(f"chosen: {what}")
    if candidate.split_block and not space.draws:
        lines.append(f"the lowest trained block is {candidate.split_block} of {shape.depth}: nothing below it is kept")
    return tuple(lines)


def _describe(request: PlanRequest, candidate: _Candidate, micro_batch: int) -> str:
    depth, space = request.shape.depth, request.space
    parts = -(-request.batch_size // micro_batch)
    batch = f"batch {request.batch_size}" + (f" in {parts} micro-batches of {micro_batch}" if parts > 1 else " at once")
    if candidate.trained_blocks == 0:
        blocks = "head only"
    elif space.draws:
        blocks = (
            f"{candidate.trained_blocks} of the {depth - candidate.split_block} blocks from {candidate.split_block} up"
        )
    else:
        blocks = f"the last {candidate.trained_blocks} of {depth} blocks"
    tokens = ""
    if space.prunes_tokens:
        tokens = (
            f", at most {candidate.token_ceiling[-1]} of {request.shape.patch_tokens} patch tokens in the last block"
        )
    return f"{batch}, {blocks}{tokens}"


def _does_not_fit(request: PlanRequest, smallest_cap: int, smaller_models: Iterable[ViTShape]) -> str:
    shape = request.shape
    message = (
        f"{shape.name} with method {request.space.name}, batch {request.batch_size} and "
        f"{request.optimizer} needs at least {format_cap(smallest_cap)}; the cap is {format_cap(request.cap_bytes)} "
        f"(of which the runtime takes {format_bytes(request.runtime_bytes)}). "
    )
    tries = [f"--ram-cap {format_cap(smallest_cap)}"]
    head = MethodSpace(name="head", splits=(shape.depth,), trained_blocks={shape.depth: (0,)})
    if smallest_cap_bytes(msgspec.structs.replace(request, space=head)) <= request.cap_bytes:
        tries.append("--method head, which fits")
    for smaller in sorted(smaller_models, key=lambda other: -other.parameters):
        if smaller.parameters >= shape.parameters or smaller.depth != shape.depth:
            continue
        other = msgspec.structs.replace(request, shape=smaller)
        if smallest_cap_bytes(other) <= request.cap_bytes:
            tries.insert(1, f"--model {smaller.name}, which fits")
            break
    return message + "Try " + " or ".join(tries) + "."


def format_cap(size: int) -> str:
    """Bytes as a `--ram-cap` value that is not below them: `612.4MiB`, rounded up to a tenth."""
    tenths = -(-size * 10 // MIB)
    return f"{tenths / 10:.1f}MiB"
