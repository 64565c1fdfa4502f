"""Mixed widths and recipe files, as they are typed and as they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loftq_cli.checkpoint.request import Request
from loftq_cli.cli.commands import main
from loftq_cli.conversion.prepare import prepare
from loftq_cli.machine.observer import Observer
from loftq_cli.settings.options import Options
from tests.support.commands import QUICK, Command


def line(text: str, label: str) -> str:
    """The value behind ``label``."""
    (found,) = [line for line in text.splitlines() if line.strip().startswith(f"{label}  ")]
    return found.split(label, 1)[1].strip()


def test_the_distribution_of_widths_is_shown(loftq: Command) -> None:
    mixed = ("--bits", "2", "--bits-map", "*.mlp.*=4,*.down_proj.*=8")
    plan = loftq("convert", "model", "--dry-run", *mixed, *QUICK)
    kinds = "4 in 2-bit uniform, 2 in 4-bit nf, 1 in 8-bit uniform"
    assert line(plan.stdout, "method") == f"{kinds}, blocks of 64"
    result = loftq("convert", "model", *mixed, *QUICK)
    assert line(result.stdout, "matrices") == f"7, {kinds}"
    assert "layout loftq, because bnb and gptq hold one width" in result.stderr
    assert line(loftq("inspect").stdout, "matrices") == f"7, {kinds}"


def test_one_width_is_shown_as_one(loftq: Command) -> None:
    assert line(loftq("convert", "model", *QUICK).stdout, "matrices") == "7, 4-bit nf"
    assert line(loftq("inspect").stdout, "matrices") == "7, 4-bit nf"


def test_a_dry_run_says_that_a_pass_will_settle_the_widths(loftq: Command) -> None:
    words = ("--target-bpw", "3.5", "--bits-map", "*.q_proj.*=8", "--dry-run")
    result = loftq("convert", "model", *words, *QUICK)
    assert result.exit_code == 0
    assert line(result.stdout, "method").startswith(
        "1 in 8-bit uniform, 6 in widths that a pass over the weights will settle"
    )
    assert line(result.stdout, "bits per weight") == "3.500"
    plan = json.loads(loftq("convert", "model", *words, "--json", *QUICK).stdout)
    found = {entry["name"].split(".")[-2]: entry["bits"] for entry in plan["selected"]}
    assert (found["q_proj"], found["k_proj"]) == (8, None)


def test_a_target_too_low_names_the_least(loftq: Command) -> None:
    result = loftq("convert", "model", "--target-bpw", "2", *QUICK)
    assert result.exit_code == 2
    assert "at least 2.5313 bits per weight" in result.stderr


def test_a_recipe_is_saved_and_used_again(loftq: Command) -> None:
    settings = ("--target-bpw", "3.5", "--rank-map", "*.mlp.*=2", "--exclude", "*.q_proj.*")
    result = loftq("convert", "model", "--save-recipe", "r.toml", *settings, *QUICK)
    assert result.exit_code == 0
    first = Path("out/model.safetensors").read_bytes()
    for recipe in ("r.toml", "out/loftq_manifest.json"):
        # The command line is not asked for anything but the recipe: the same conversion.
        again = loftq("convert", "model", "--recipe", recipe)
        assert again.stderr.endswith("nothing to do: out is complete and verified\n")
    result = loftq("convert", "model", "-o", "other", "--recipe", "r.toml", "--seed", "0")
    assert result.exit_code == 0
    assert Path("other/model.safetensors").read_bytes() == first


def test_the_command_line_wins_over_the_recipe(loftq: Command) -> None:
    Path("r.toml").write_text('bits = 3\nmethod = "nf"\npreset = "paper"\n')
    words = ("--recipe", "r.toml", "--bits", "2", "--scale", "mse", "--dry-run", "--json")
    recipe = json.loads(loftq("convert", "model", *words).stdout)["recipe"]
    assert (recipe["bits"], recipe["method"]) == (2, "nf")
    assert (recipe["scale"], recipe["svd"]) == ("mse", "exact")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--recipe", "none.toml"), 3, "none.toml: no such file"),
        (("--recipe", "bad.toml"), 2, "bad.toml: unknown setting 'bit' (did you mean 'bits'?)"),
        (("--save-recipe", "no/where.toml"), 2, "there is no directory no"),
        (("--save-recipe", "model"), 2, "is a directory"),
        (("--save-recipe", "r.toml", "--dry-run"), 2, "--dry-run writes nothing"),
    ],
)
def test_one_line_says_what_is_wrong_with_a_recipe(
    words: tuple[str, ...], code: int, message: str, loftq: Command
) -> None:
    Path("bad.toml").write_text("bit = 2\n")
    result = loftq("convert", "model", *words, *QUICK)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("out").exists()


def test_every_setting_of_the_command_line_is_one_of_a_recipe_s(place: Path) -> None:
    """And the other way round, but for the three that have no option of their own."""
    about_the_run = {
        *("model", "output", "revision", "offline", "overwrite", "dry_run", "as_json", "quiet"),
        *("verbose", "recipe_file", "save_recipe", "discard_shards", "allow_pickle"),
        *("texts", "moments", "refining", "log_file", "part"),
        *("target_size", "fit", "fit_length", "fit_batch"),  # which come to target_bpw
    }
    options = {str(parameter.name) for parameter in main.commands["convert"].params}
    plan, _ = prepare(Request("./model"), place / "out", Options(), observer=Observer())
    settings = plan.recipe.as_dict().keys() - {"kernels", "layout_fallback"}
    assert options - about_the_run - {"preset"} == settings - {"keep", "momentum", "widths"}
