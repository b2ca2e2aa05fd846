"""Sizes, durations and rates, both ways."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.units import parse_duration, parse_rate, parse_size, size, span


@given(st.integers(0, 1 << 60), st.booleans())
def test_what_is_shown_is_what_was_meant(count: int, si: bool) -> None:
    shown = size(count, si=si)
    assert re.fullmatch(r"\d{1,4} B|\d{1,4}\.\d [kKMGTP]i?B", shown)
    assert abs(parse_size(shown) - count) <= max(1, count * 0.051), "one digit behind the point"
    # In a unit that fits: never a thousand of one, as long as there is a larger one.
    assert float(shown.split()[0]) < 1000 or shown.endswith((" B", " PB", " PiB"))


@given(st.integers(0, 1 << 60), st.integers(0, 1 << 60), st.booleans())
def test_more_is_never_shown_as_less(one: int, other: int, si: bool) -> None:
    few, many = sorted((one, other))
    assert parse_size(size(few, si=si)) <= parse_size(size(many, si=si))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("0", 0),
        (" 200 GB ", 200 * 10**9),
        ("1.5TiB", 3 << 39),
        ("1k", 1000),
        ("1ki", 1024),
        ("512B", 512),
        ("2pb", 2 * 10**15),
    ],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count
    assert parse_rate(f"{text}/s") == parse_rate(text) == float(count)


def test_a_rate_in_one_word() -> None:
    assert parse_rate(" 1.2GB/s ") == 1.2e9
    assert parse_rate("200 MiB/s") == 200 * 2**20
    assert parse_rate("10Gb/s") == parse_rate("10 Gbit/s") == parse_rate("10Gbps") == 1.25e9
    assert parse_rate("10gb/s") == parse_rate("10GB/s") == 1e10


@pytest.mark.parametrize("text", ["", "GB", "many", "-1", "-2GB", "nan", "inf", "1e30", "1GB/m", "2 furlongs", "/s"])
def test_what_is_no_size_is_no_rate_either(text: str) -> None:
    for parse in (parse_size, parse_rate):
        with pytest.raises(ValueError, match=r"could not convert|out of range"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1.5s", 1.5), ("350ms", 0.35), ("90m", 5400), (" 2h ", 7200), ("1d", 86400), ("36H", 129600), ("1w", 604800)],
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "ms", "-1h", "nans", "infd", "1e20w", "2y", "an hour", "1h30m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"no unit|could not convert|out of range"):
        parse_duration(text)


@given(st.floats(0, 1e9))
def test_a_span_is_rounded_down_and_short(seconds: float) -> None:
    shown = span(seconds)
    assert len(shown) <= 4
    if not shown.endswith("y"):
        read = parse_duration(shown)
        assert read <= seconds < read + parse_duration(f"1{shown[-1]}")


def test_a_span_that_is_none_is_zero() -> None:
    assert span(-5) == "0s"
    assert span(31557600 * 3) == "3y"
