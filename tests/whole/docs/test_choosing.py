"""docs/choosing.md: its commands work, its sizes are computed, its figures are other pages'."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from loftq_cli.cli.commands import main
from tests.support import models
from tests.support.pages import LANGUAGE, WORTH, measured, page, table

PAGE = page("choosing.md")
COMMANDS = re.findall(r"`(loftq convert MODEL .*?|loftq convert MODEL)`", PAGE)
ADAPTED_BYTES = 16  # float32: value, gradient, two moments
BLOCK = 64


def sizes(blocks: int, h: int, i: int, kv: int, vocabulary: int) -> dict[str, float]:
    """GB of the weights by width, and of an adapter in training by rank."""
    sides = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
    quantized = blocks * sum(a * b for a, b in sides)
    rest = 2 * vocabulary * h * 2
    stored = {bits: bits + (32 + bits) / BLOCK for bits in (2, 3, 8)} | {4: 4 + 32 / BLOCK, 16: 16}
    adapter = blocks * sum(a + b for a, b in sides) * ADAPTED_BYTES
    return {
        f"{bits} bits": (quantized * stored[bits] / 8 + rest) / 1e9 for bits in (2, 3, 4, 8, 16)
    } | {f"rank {rank}": rank * adapter / 1e9 for rank in (16, 64)}


HEADER = "| model | blocks"
SIZES = {
    name: sizes(*map(int, cells[:5])) for name, *cells in ([*row] for row in table(PAGE, HEADER))
}


def test_the_sizes_are_computed_as_the_page_says() -> None:
    for name, *cells in table(PAGE, HEADER):
        assert [float(cell) for cell in cells[5:]] == pytest.approx(
            list(SIZES[name].values()), abs=0.051
        )


def test_the_stored_bits_are_those_of_the_measured_conversions() -> None:
    shown = re.search(r"Stored bits are ([\d.]+), ([\d.]+), ([\d.]+) \(nf\) and ([\d.]+)", PAGE)
    assert shown is not None
    computed = [2 + 34 / BLOCK, 3 + 35 / BLOCK, 4 + 32 / BLOCK, 8 + 40 / BLOCK]
    assert [float(bits) for bits in shown.groups()] == pytest.approx(computed, abs=0.0005)
    stored = {(row[0], row[1]): float(row[11]) for row in table(page("algorithm.md"), WORTH)}
    for (bits, method), expected in zip([("2", "uniform"), ("3", "uniform")], computed):
        assert stored[bits, method] == pytest.approx(expected, abs=0.001)
    assert stored["4", "nf"] == pytest.approx(computed[2], abs=0.003)  # with its table of levels


def test_the_table_by_card_follows_from_the_sizes() -> None:
    header = next(line for line in PAGE.splitlines() if line.startswith("| card |"))
    names = [cell.strip() for cell in header.strip("|").split("|")][1:]
    assert names == list(SIZES)
    for card, *cells in table(PAGE, header):
        room = 0.75 * int(card.removesuffix(" GB"))
        for name, cell in zip(names, cells, strict=True):
            assert cell == " / ".join(widest(SIZES[name], rank, room) for rank in (16, 64)), card


def widest(size: dict[str, float], rank: int, room: float) -> str:
    """The widest codes that fit into ``room`` GB with an adapter of ``rank``."""
    fits = [b for b in (2, 3, 4, 8) if size[f"{b} bits"] + size[f"rank {rank}"] <= room]
    return str(max(fits)) if fits else "\u2013"


def test_the_perplexities_are_those_of_the_measurement() -> None:
    figures = measured("results/language-model.md", LANGUAGE)
    shown = table(PAGE, "| start | before training |")
    assert len(shown) == 9
    for start, before, after in shown:
        assert [before, after] == [figures[start][0], figures[start][7]], start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("choosing")
    models.save_tokenizer(models.save(models.llama(), directory / "model"))
    (directory / "notes.txt").write_text("Nobody knew why the mill stood still. " * 20)
    return directory


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(COMMANDS) if "experts" not in c])
def test_the_commands_are_accepted(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = shlex.split(command.replace("MODEL", "model"))[1:]
    result = CliRunner().invoke(main, [*words, *{"--dry-run"}.difference(words)])
    assert result.exit_code == 0, result.output


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10
