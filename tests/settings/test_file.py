"""``--recipe`` and ``--save-recipe``: what a file may say, who wins, and that it leads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomllib

import loftq_cli
from loftq_cli.errors import InputError, SourceNotFoundError, UsageError
from loftq_cli.settings import file as recipe_file
from tests.support import checkpoints

KEYS = "keys are the long options of `loftq convert`, with underscores"
QUICK: dict[str, Any] = {"iters": 1, "rank": 4, "threads": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model", checkpoints.llama(layers=2), cuts=(7,))


def write(directory: Path, text: str) -> Path:
    path = directory / "recipe.toml"
    path.write_text(text, "utf-8")
    return path


def test_the_file_overrules_a_preset_and_is_overruled(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        # a comment
        preset = "paper"
        bits = 2
        scale = "mse"
        include = ["lm_head.weight"]
        lora_alpha = 8
        """,
    )
    found = recipe_file.options({"bits": None, "rank": 32, "include": ()}, path).resolve()
    assert (found.svd, found.keep) == ("exact", "last")
    assert (found.scale, found.bits, found.lora_alpha) == ("mse", 2, 8)
    assert (found.rank, found.include) == (32, ("lm_head.weight",))
    found = recipe_file.options({"bits": 3, "scale": "absmax", "include": "a"}, path).resolve()
    assert (found.bits, found.scale, found.include) == (3, "absmax", ("a",))
    assert recipe_file.options({"preset": "default"}, path).resolve().svd == "fast"


def test_maps_as_lists_texts_and_tables(tmp_path: Path) -> None:
    for text in (
        'bits_map = ["*=2", "*.q.*=4"]',
        'bits_map = "*=2,*.q.*=4"',
        'bits_map = {"*" = 2, "*.q.*" = 4}',
        '[bits_map]\n"*" = 2\n"*.q.*" = 4',
    ):
        options = recipe_file.options({}, write(tmp_path, text))
        assert options.given["bits_map"] == ("*=2", "*.q.*=4")


def test_bits_and_target_take_each_other_s_place(tmp_path: Path) -> None:
    path = write(tmp_path, "target_bpw = 3.0\nwidths = ['a=2']")
    assert recipe_file.options({}, path).given["widths"] == ("a=2",)
    given = recipe_file.options({"bits": 2}, path).resolve()
    assert (given.bits, given.target_bpw, given.widths) == (2, None, ())
    given = recipe_file.options({"target_bpw": 4.0}, path).resolve()
    assert (given.bits, given.target_bpw, given.widths) == (None, 4.0, ())
    # Another setting may lead to other widths.
    assert "widths" not in recipe_file.options({"block_size": 32}, path).given
    given = recipe_file.options({"target_bpw": 4.0}, write(tmp_path, "bits = 2")).resolve()
    assert (given.bits, given.target_bpw) == (None, 4.0)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("bit = 2", "unknown setting 'bit'", "did you mean 'bits'?"),
        ("block-size = 64", "unknown setting 'block-size'", "did you mean 'block_size'?"),
        ("[quantizer]\nbits = 2", "unknown setting 'quantizer'", KEYS),
        ("kernels = '1:tensor+float32'", "unknown setting 'kernels'", KEYS),
        ("bits = 5", "--bits 5: not one of", None),
        ("bits = true", "--bits True: must be a number, not true or false", KEYS),
        ('bits = "2"', "--bits '2': must be a number, not text", KEYS),
        ("bits = [2]", "--bits [2]: must be a number, not a list", None),
        ("bits = inf", "--bits inf: not one of", None),
        ('rank = "8"', "--rank '8': must be a whole number from 1", None),
        ('block_size = "64"', "--block-size '64': not one of 32", None),
        ('lora_alpha = "8"', "--lora-alpha '8': must be a positive number", None),
        (f"lora_alpha = {10**400}", "--lora-alpha 1000", None),
        ('target_bpw = "3"', "--target-bpw '3': must be a positive number", None),
        ('embeddings = "yes"', "--embeddings 'yes': must be true or false, not text", None),
        ("embeddings = 1", "--embeddings 1: must be true or false", None),
        ("stats = 3", "--stats 3: must be the path of a file", None),
        ("rank = 1.5", "--rank 1.5: must be a whole number", None),
        ("rank = 2026-01-01", "--rank 2026-01-01: must be a whole number", None),
        ("method = ['nf']", "--method ['nf']: not one of", None),
        ("preset = 0", "--preset 0: not one of", None),
        ("device = 3", "--device 3: use auto", None),
        ("include = 3", "--include 3: must be a pattern", None),
        ("bits_map = ['*']", "--bits-map '*': must be PATTERN=NUMBER", None),
        ("bits = 2\ntarget_bpw = 3", "--target-bpw 3 and --bits 2", None),
    ],
)
def test_a_bad_setting_names_the_file(
    text: str, message: str, hint: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        recipe_file.options({}, path)
    assert caught.value.message.startswith(f"{path}: {message}")
    assert caught.value.exit_code == 2
    assert hint is None or caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.toml", b"bits = ", "not valid TOML"),
        ("r.toml", b"bits = 2\nbits = 3", "not valid TOML"),
        ("r.toml", b"\xff\xfe", "not valid TOML"),
        ("r.toml", b"a = " + b"[" * 100_000, "not valid TOML"),
        ("r.json", b"[]", "not a JSON object"),
        ("loftq_manifest.json", b"{}", "no format_version"),
        ("r.json", b"bits = 2", "not valid JSON"),
        ("r.json", b'{"format_version": 99}', "format version 99"),
        ("r.json", b'{"format_version": 1}', "the manifest is damaged"),
    ],
)
def test_what_is_no_recipe(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        recipe_file.options({}, path)
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message
    assert caught.value.exit_code == 3


def test_settings_in_json_are_as_good_as_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.JSON"
    path.write_text('{"bits": 2, "bits_map": {"*.q.*": 4}, "rank": null, "exclude": ["a"]}')
    found = recipe_file.options({"iters": 1}, path)
    given = {"bits": 2, "bits_map": ("*.q.*=4",), "exclude": ("a",), "iters": 1}
    assert found.given == given
    path.write_text("{}")
    assert recipe_file.options({}, path).resolve() == recipe_file.options({}).resolve()


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ({"bit": 2}, "unknown setting 'bit'", "did you mean 'bits'?"),
        ({"architectures": ["LlamaForCausalLM"]}, "unknown setting 'architectures'", KEYS),
        ({"bits": "2"}, "--bits '2': must be a number, not text", KEYS),
    ],
)
def test_a_bad_setting_in_json_names_the_file(
    content: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        recipe_file.options({}, path)
    assert (caught.value.message, caught.value.hint) == (f"{path}: {message}", hint)


@pytest.mark.parametrize("name", ["none.toml", "none.json", "."])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file") as caught:
        recipe_file.options({}, tmp_path / name)
    assert caught.value.exit_code == 3


SETTINGS: list[dict[str, Any]] = [
    {"bits": 2, "exclude": ["*.q_proj.*"], "lora_alpha": 8},
    {"method": "uniform-block", "bits": 3, "include": "lm_head.weight", "preset": "paper"},
    {"bits": 2.5, "bits_map": "*.v_proj.*=8", "rank_map": "*.mlp.*=2", "seed": 7},
    {"target_bpw": 3.3, "scale_dtype": "bfloat16", "bits_map": "*.v_proj.*=4"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "paper", "mixed", "target"])
def test_a_manifest_or_a_saved_recipe_leads_to_the_same_bytes(
    settings: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loftq_cli.convert(model, tmp_path / "first", **{**QUICK, **settings})
    saved = tmp_path / "saved.toml"
    recipe_file.save(saved, first["recipe"])
    # What a pass over the weights settled is not settled again.
    monkeypatch.setattr(
        "loftq_cli.planning.target.settle", lambda plan, observer: pytest.fail("a pass")
    )
    expected = checkpoints.files(tmp_path / "first")
    manifest = json.loads(expected.pop("loftq_manifest.json"))
    for number, recipe in enumerate((tmp_path / "first/loftq_manifest.json", saved)):
        output = tmp_path / f"again{number}"
        loftq_cli.convert(model, output, recipe=recipe)
        found = checkpoints.files(output)
        again = json.loads(found.pop("loftq_manifest.json"))
        assert found == expected
        assert {**again, "environment": None} == {**manifest, "environment": None}


def test_a_scale_that_left_float16_leads_back_through_the_same_fallback(tmp_path: Path) -> None:
    tensors = {name: tensor * 1e6 for name, tensor in checkpoints.llama().items()}
    model = checkpoints.write(tmp_path / "model", tensors)
    first = loftq_cli.convert(model, tmp_path / "first", bits=2, **QUICK)
    assert first["recipe"]["layout_fallback"] == "float16-range"
    again = loftq_cli.convert(
        model, tmp_path / "again", recipe=tmp_path / "first/loftq_manifest.json"
    )
    assert again["fingerprint"] == first["fingerprint"]
    assert again["outputs"] == first["outputs"]


def test_the_saved_text_is_toml_that_reads_back(tmp_path: Path) -> None:
    strange = ['a"b\\c', "tab\t", "del\x7f", "ünïcödé 🙂", "new\nline"]
    recipe = {
        "exclude": strange,
        "include": [],
        "bits": 2.5,
        "rank": 16,
        "method": "nf",
        "scale": "fixed",
        "lora_alpha": 1e16,
        "kernels": "1:native+float32",
        "layout": "loftq",
        "layout_fallback": None,
        "target_bpw": None,
    }
    recipe_file.save(tmp_path / "r.toml", recipe)
    assert tomllib.loads((tmp_path / "r.toml").read_text("utf-8")) == {
        "exclude": strange,
        "bits": 2.5,
        "rank": 16,
        "method": "nf",
        "lora_alpha": 1e16,
        "layout": "loftq",
        "momentum": False,  # not in the recipe: older than these two
        "feedback": False,
    }


def test_settled_widths_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    loftq_cli.convert(model, tmp_path / "first", target_bpw=3.3, **QUICK)
    other = checkpoints.write(tmp_path / "other", checkpoints.llama(layers=3))
    with pytest.raises(UsageError, match=r"widths are of other matrices.*layers\.2") as caught:
        loftq_cli.convert(other, tmp_path / "o", recipe=tmp_path / "first/loftq_manifest.json")
    assert "settles them anew" in caught.value.hint
    manifest = loftq_cli.convert(
        other, tmp_path / "o", recipe=tmp_path / "first/loftq_manifest.json", target_bpw=3.3
    )
    assert len(manifest["recipe"]["widths"]) == 21
