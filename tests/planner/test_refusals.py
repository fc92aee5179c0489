"""What does not fit is refused with the smallest cap that would do, and with what else would help."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import RUNTIME, capped, make_request, requests
from shapes import make_shape

from edgetune.cost import ViTShape
from edgetune.errors import DoesNotFit
from edgetune.planner import PlanRequest, plan, process_bytes, smallest_cap_bytes
from edgetune.units import parse_bytes


@given(requests())
@settings(deadline=None)
def test_the_smallest_cap_of_a_refusal_fits_and_one_byte_less_does_not(request: PlanRequest) -> None:
    with pytest.raises(DoesNotFit) as refused:
        plan(capped(request, RUNTIME))
    smallest = refused.value.smallest_cap_bytes
    assert smallest == smallest_cap_bytes(request)
    assert plan(capped(request, smallest)).predicted_peak_bytes == smallest
    with pytest.raises(DoesNotFit) as narrow:
        plan(capped(request, smallest - 1))
    assert narrow.value.smallest_cap_bytes == smallest
    # And what the message tells people to type fits too.
    asked = re.search(r"--ram-cap ([\d.]+MiB)", str(refused.value))
    assert asked
    plan(capped(request, parse_bytes(asked.group(1))))


@given(st.integers(-(2**40), RUNTIME))
def test_a_cap_that_the_runtime_alone_passes_is_refused(cap: int) -> None:
    request = make_request("head", cap_mib=0)
    with pytest.raises(DoesNotFit, match="of which the runtime takes 200 MiB"):
        plan(capped(request, cap))


def _model(name: str, width: int, **others: object) -> ViTShape:
    return make_shape(name=name, width=width, **others)  # type: ignore[arg-type]


OTHERS = (_model("base", 768), _model("small", 384), _model("tiny", 192), _model("nano", 96), _model("pico", 48))


def _named(request: PlanRequest, others: tuple[ViTShape, ...]) -> str | None:
    with pytest.raises(DoesNotFit) as refused:
        plan(request, others)
    match = re.search(r"--model (\w+), which fits", str(refused.value))
    return match.group(1) if match else None


def test_the_refusal_names_the_largest_smaller_model_that_fits() -> None:
    cap = smallest_cap_bytes(make_request("alast", shape=OTHERS[2]))
    request = capped(make_request("alast", shape=OTHERS[0]), cap)
    assert _named(request, OTHERS) == "tiny"
    plan(msgspec.structs.replace(request, shape=OTHERS[2]))
    assert _named(capped(request, cap - 1), OTHERS) == "nano"
    assert _named(capped(request, RUNTIME), OTHERS) is None


def test_a_model_is_not_named_that_is_larger_deeper_or_can_not_be_trained_so() -> None:
    cap = smallest_cap_bytes(make_request("alast", shape=OTHERS[0])) - 1
    request = capped(make_request("alast", shape=OTHERS[0]), cap)
    unfit = (
        _model("larger", 1024),
        _model("shallower", 192, depth=6),
        _model("tokenless", 192, class_token=False),
        _model("pooled", 192, token_pool=False),
        _model("divided", 192, fused_qkv=False),
    )
    assert _named(request, unfit) is None
    assert _named(msgspec.structs.replace(request, recompute="mlp"), (_model("whole", 192, mlp_half=False),)) is None
    assert _named(request, (*unfit, _model("tiny", 192))) == "tiny"


@pytest.mark.parametrize("fits", [False, True])
def test_the_head_alone_is_offered_only_where_it_fits(fits: bool) -> None:
    cap = smallest_cap_bytes(make_request("head")) - (not fits)
    with pytest.raises(DoesNotFit) as refused:
        plan(capped(make_request("full"), cap))
    assert ("--method head" in str(refused.value)) is fits


def test_no_method_needs_less_than_its_largest_phase_beside_training() -> None:
    # Twice the weights while they are loaded is more than the head's step ever takes.
    request = make_request("head", batch_size=1, load_copies=3.0)
    weights = 4 * request.shape.parameters
    smallest = smallest_cap_bytes(request)
    assert smallest >= process_bytes(RUNTIME, 3 * weights, 0)
    chosen = plan(capped(request, smallest))
    assert chosen.predicted_phase_bytes["load"] == smallest > chosen.predicted_phase_bytes["train"]
