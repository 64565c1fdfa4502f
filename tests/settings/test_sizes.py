"""Sizes as people write them."""

from __future__ import annotations

import pytest

from loftq_cli.errors import UsageError
from loftq_cli.settings.sizes import binary, decimal, size_of


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("3.5GB", 3_500_000_000),
        ("3.5 gb", 3_500_000_000),
        ("0.1kB", 100),
        (".5MiB", 2**19),
        ("1TiB", 2**40),
        ("7B", 7),
    ],
)
def test_what_a_size_is(text: str, nbytes: int) -> None:
    assert size_of("--fit", text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "24", "24G", "GiB", "-3GB", "nan GB", "inf", "3,5GB", "1e3GB", "24iB", "24 GiBs", "٣GB"],
)
def test_what_none_is_is_an_error_that_names_the_option(text: str) -> None:
    with pytest.raises(UsageError, match=r"--fit .*such as 24GiB or 3\.5GB"):
        size_of("--fit", text)


@pytest.mark.parametrize("text", ["0GB", "0.1B", "9999999TB"])
def test_sizes_that_nothing_has(text: str) -> None:
    with pytest.raises(UsageError, match="from 1 byte to 1,000,000 TB"):
        size_of("--memory", text)


def test_a_unit_that_may_be_either_is_asked_about() -> None:
    with pytest.raises(UsageError) as error:
        size_of("--memory", "24G")
    assert "24GiB is 1024 to a step" in error.value.hint


def test_how_they_are_shown() -> None:
    assert [decimal(n) for n in (999, 1500, 3_500_000_000)] == ["999 B", "1.50 kB", "3.50 GB"]
    assert [binary(n) for n in (1023, 1536, 24 * 2**30)] == ["1023 B", "1.50 KiB", "24.00 GiB"]
    assert binary(2**50) == "1048576.00 GiB"
