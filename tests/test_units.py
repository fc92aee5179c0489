"""Sizes and durations go in as people write them and come out as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgetune.errors import UsageError
from edgetune.units import (
    GIB,
    KIB,
    MIB,
    format_bytes,
    format_count,
    format_memory,
    format_seconds,
    parse_bytes,
)

LARGEST = 2**62 - 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * MIB),
        ("512mib", 512 * MIB),
        ("900M", 900 * MIB),
        ("900m", 900 * MIB),
        ("1.5 GB", 1_500_000_000),
        ("2 G", 2 * GIB),
        ("2GiB", 2 * GIB),
        ("10k", 10 * KIB),
        ("10kB", 10_000),
        ("0.5KiB", 512),
        ("536870912", 512 * MIB),
        ("7b", 7),
        ("  64 MiB  ", 64 * MIB),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0.0MiB", "0.4", "-1MiB", "+1MiB", "MiB", "1.MiB", ".5GB", "1e3", "1,5GB", "1 2", "1TB", "1 MiB/s",
     "nan", "inf", "0x10", "٣MiB", "1MiB\n1", "512 megabytes", "9999999999999GiB"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="512MiB") as refused:
        parse_bytes(text)
    assert repr(text) in str(refused.value)


@given(st.text())
def test_any_text_gives_a_size_or_a_usage_error(text: str) -> None:
    try:
        size = parse_bytes(text)
    except UsageError:
        return
    assert 0 < size <= LARGEST


@given(st.integers(1, LARGEST))
@example(LARGEST)
@example(2**53 + 1)
def test_a_plain_number_of_bytes_is_read_exactly(size: int) -> None:
    assert parse_bytes(str(size)) == size


@given(st.integers(1, 2**50))
def test_what_is_shown_reads_back_within_its_three_figures(size: int) -> None:
    shown = format_bytes(size)
    assert re.fullmatch(r"\d+(\.\d)? (B|KiB|MiB|GiB)", shown)
    assert parse_bytes(shown) == pytest.approx(size, rel=0.051)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (412 * MIB, "412 MiB"),
        (99.4 * MIB, "99.4 MiB"),
        (2 * GIB, "2048 MiB"),
        (10 * GIB, "10.0 GiB"),
        (128 * GIB, "128 GiB"),
        (-3 * MIB, "-3.0 MiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(size: float, shown: str) -> None:
    assert format_bytes(size) == shown


@given(st.floats(0, 2**60), st.floats(0, 2**60))
def test_a_larger_size_is_never_shown_as_a_smaller_one(one: float, other: float) -> None:
    less, more = sorted((one, other))
    factors = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}

    def read(shown: str) -> float:
        value, unit = shown.split()
        return float(value) * factors[unit]

    assert read(format_bytes(less)) <= read(format_bytes(more))


def test_memory_is_shown_beside_its_cap() -> None:
    assert format_memory(412 * MIB, 900 * MIB) == "412 MiB of 900 (46 %)"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (8.3, "8.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (4350, "1 h 12 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations_are_shown_as_they_are_said(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (5_700_000, "5.7 M"),
        (340e9, "340 G"),
        (1.2e12, "1.2 T"),
        (3e15, "3 P"),
        (999_999, "1 M"),
    ],
)
def test_counts_carry_an_si_suffix(value: float, shown: str) -> None:
    assert format_count(value) == shown
