"""Settings: what is allowed, what a preset supplies, and what the fingerprint depends on."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from loftq_cli.checkpoint.schema import manifest_schema
from loftq_cli.errors import LayoutError, UsageError
from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from loftq_cli.numerics.quantizers.methods import WIDTHS
from loftq_cli.planning.given import METHOD
from loftq_cli.settings.options import Options
from loftq_cli.settings.recipe import Recipe, fingerprint, recipe_schema, settings_of
from loftq_cli.settings.table import BLOCK_SIZES, DTYPES, PRESETS, Settings, entries

RECIPE = Recipe(
    bits=4,
    method="nf",
    rank=16,
    iters=5,
    block_size=64,
    layout="bnb",
    layout_fallback=None,
    scale="mse",
    order="quantize-first",
    svd="fast",
    keep="best",
    momentum=True,
    feedback=True,
    feedback_passes=1,
    include=("a", "b"),
    exclude=(),
    embeddings=False,
    stats=None,
    lora_alpha=None,
    adapter_dtype="source",
    dense_dtype="source",
    device="cpu",
    threads=2,
    seed=0,
    scale_dtype="float32",
    kernels="1:tensor+float32",
    bits_map=("*.q.*=2",),
    rank_map=(),
    target_bpw=None,
    widths=(),
)
METHODS = ("auto", "nf", "nf-symmetric", "fitted", "uniform", "uniform-block", "uniform-tensor")
SOURCES = [("config.json", 10, "aa"), ("model.safetensors", 20, "bb")]


def usage_error(**settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        Options(**settings).resolve()
    assert caught.value.exit_code == 2
    return caught.value.message


def test_the_defaults_are_those_documented():
    resolved = Options().resolve()
    assert (resolved.bits, resolved.rank, resolved.iters, resolved.block_size) == (4, 16, 5, 64)
    assert (resolved.method, resolved.layout, resolved.device) == ("auto", "auto", "auto")
    assert (resolved.scale, resolved.order, resolved.svd) == ("mse", "quantize-first", "fast")
    assert (resolved.adapter_dtype, resolved.dense_dtype) == ("source", "source")
    assert resolved.scale_dtype == "float32"
    assert (resolved.lora_alpha, resolved.threads, resolved.seed) == (None, None, 0)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("bits", WIDTHS),
        (
            "method",
            METHODS,
        ),
        ("block_size", BLOCK_SIZES),
        ("layout", ("auto", "bnb", "gptq", "loftq", "dense")),
        ("scale", ("mse", "absmax")),
        ("scale_dtype", ("float32", "bfloat16", "int8")),
        ("order", ("quantize-first", "svd-first")),
        ("svd", ("fast", "exact")),
        ("adapter_dtype", DTYPES),
        ("dense_dtype", DTYPES),
        ("keep", ("best", "last")),
    ],
)
def test_choices(name, choices):
    for choice in choices:
        assert getattr(Options(**{name: choice}).resolve(), name) == choice
    for wrong in (0, -4, 5, "", "NF", "mse ", True):
        message = usage_error(**{name: wrong})
        shown = wrong if isinstance(choices[0], str) or not isinstance(wrong, str) else repr(wrong)
        if name == "bits" and isinstance(wrong, (str, bool)):
            kind = "text" if isinstance(wrong, str) else "true or false"
            assert message == f"--bits {shown}: must be a number, not {kind}"
            continue
        assert message.startswith(f"--{name.replace('_', '-')} {shown}: not one of ")
        assert all(str(choice) in message for choice in choices)


def test_the_presets_are_named_where_one_is_unknown():
    message = usage_error(preset="papers")
    assert message.startswith("--preset papers: not one of ")
    assert all(preset in message for preset in PRESETS)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("rank", 1, 65_536),
        ("iters", 0, 1_000),
        ("feedback_passes", 1, 1_000),
        ("seed", 0, 2**63 - 1),
        ("threads", 1, 1024),
    ],
)
def test_ranges(name, lowest, highest):
    for value in (lowest, highest):
        assert getattr(Options(**{name: value}).resolve(), name) == value
    for wrong in (lowest - 1, highest + 1, -(10**30), 1.5, float("nan"), "3", True):
        shown = "'3'" if wrong == "3" else wrong
        assert usage_error(**{name: wrong}) == (
            f"--{name.replace('_', '-')} {shown}: must be a whole number from {lowest} to {highest}"
        )


@pytest.mark.parametrize("alpha", [0, 0.0, -1, 1e31, float("nan"), float("inf"), float("-inf")])
def test_lora_alpha_is_a_positive_number(alpha):
    assert usage_error(lora_alpha=alpha) == (
        f"--lora-alpha {alpha}: must be a positive number up to 1e+30"
    )
    assert Options(lora_alpha=0.5).resolve().lora_alpha == 0.5


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("bit", "did you mean 'bits'?"),
        ("blocksize", "did you mean 'block_size'?"),
        ("block-size", "did you mean 'block_size'?"),
        ("lora_alfa", "did you mean 'lora_alpha'?"),
        ("xyzzy", ""),
    ],
)
def test_an_unknown_setting_shows_a_near_name(wrong, hint):
    with pytest.raises(UsageError) as caught:
        Options(**{"bits": 2, wrong: 4})
    assert caught.value.message == f"unknown setting {wrong!r}"
    assert caught.value.hint == hint


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_one_pattern_or_several(name):
    for given, expected in (
        ("*.q_proj.weight", ("*.q_proj.weight",)),
        (["a", "b"], ("a", "b")),
        ((), ()),
        (None, ()),
    ):
        options = Options(**{name: given} if given is not None else {})
        assert options.given.get(name, ()) == expected


def test_the_preset_paper_is_the_reference_code():
    resolved = Options(preset="paper").resolve()
    assert (resolved.method, resolved.scale, resolved.svd, resolved.keep) == (
        "nf",
        "absmax",
        "exact",
        "last",
    )
    assert (resolved.bits, resolved.rank, resolved.iters) == (4, 16, 5)
    assert not resolved.momentum


def test_the_preset_best_takes_more_steps_and_passes_and_changes_nothing_else():
    more = dataclasses.replace(Options().resolve(), iters=20, feedback_passes=3)
    assert Options(preset="best").resolve() == more
    assert Options("best", scale="absmax").resolve().feedback_passes == 1


def test_more_passes_of_feedback_need_feedback_and_scales_that_are_fitted():
    assert Options(feedback_passes=2).resolve().feedback_passes == 2
    assert Options(feedback_passes=1, feedback=False).resolve().feedback_passes == 1
    assert usage_error(feedback_passes=2, feedback=False) == "--feedback-passes 2 needs --feedback"
    message = usage_error(feedback_passes=2, feedback=True, scale="absmax")
    assert message == "--feedback-passes 2 needs scales that are fitted"


@pytest.mark.parametrize("given", [False, True])
def test_momentum_is_a_setting_without_an_option(given):
    assert Options().resolve().momentum
    assert Options(momentum=given).resolve().momentum == given
    for options in ({"scale": "absmax"}, {"method": "uniform-block"}, {"preset": "paper"}):
        assert not Options(**options).resolve().momentum
        pushed = Options(**{**options, "momentum": True}).resolve()
        assert pushed.momentum
    assert Options(method="fitted").resolve().momentum
    assert usage_error(momentum=2).startswith("--momentum 2: must be true or false")


@pytest.mark.parametrize(
    ("name", "value"), [("method", "uniform"), ("scale", "mse"), ("svd", "fast"), ("bits", 2)]
)
def test_an_explicit_option_wins_over_the_preset(name, value):
    paper = dataclasses.asdict(Options(preset="paper").resolve())
    resolved = dataclasses.asdict(Options(**{"preset": "paper", name: value}).resolve())
    assert resolved == paper | {name: value}


@pytest.mark.parametrize("method", ["fitted", "uniform-block", "uniform-tensor"])
@pytest.mark.parametrize("scale", ["mse", "absmax"])
def test_methods_with_a_scale_of_their_own_refuse_another(method, scale):
    assert usage_error(method=method, scale=scale) == (
        f"--scale does not apply to --method {method}, which fixes its own"
    )
    assert Options(method=method, preset="paper").resolve().method == method


def test_a_recipe_is_json_and_holds_every_field():
    as_dict = RECIPE.as_dict()
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert set(as_dict) == fields - {"structure", "backbone"}  # nothing looked up, none given
    whole = dataclasses.replace(RECIPE, structure="aa", backbone="held")
    assert set(whole.as_dict()) == fields
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["include"] == ["a", "b"]


def test_the_fallback_differs_in_the_layout_and_says_why():
    changed = dataclasses.replace(RECIPE, layout="gptq").with_fallback()
    assert changed == dataclasses.replace(RECIPE, layout="loftq", layout_fallback="float16-range")


def test_the_fingerprint_ignores_the_order_of_keys_and_files():
    expected = fingerprint(RECIPE.as_dict(), SOURCES)
    reordered = dict(reversed(RECIPE.as_dict().items()))
    assert fingerprint(reordered, SOURCES[::-1]) == expected
    assert len(expected) == 64


def test_the_fingerprint_is_of_these_bytes():
    """What is hashed is part of the format: journals and manifests of older versions hold it."""
    recipe = {"bits": 4, "method": "nf"}
    # printf '{"recipe":{"bits":4,"method":"nf"},"sources":[["m",3,"aa"]]}' | sha256sum
    assert fingerprint(recipe, [("m", 3, "aa")]) == (
        "da05edd06672c67fb9d0410bdba1c1efc103f7cc08f7e697c8ec4371335601fe"
    )


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_the_fingerprint_changes_with_every_setting(field):
    old = getattr(RECIPE, field.name)
    others = {int: 7, str: "other", tuple: ("other",), type(None): 3}
    new: Any = not old if isinstance(old, bool) else others[type(old)]
    changed = dataclasses.replace(RECIPE, **{field.name: new})
    assert fingerprint(changed.as_dict(), SOURCES) != fingerprint(RECIPE.as_dict(), SOURCES)


@pytest.mark.parametrize(
    "sources",
    [
        SOURCES[:1],
        [*SOURCES, ("z", 1, "cc")],
        [("config.json", 11, "aa"), SOURCES[1]],
        [("config.json", 10, "ab"), SOURCES[1]],
        [("config2.json", 10, "aa"), SOURCES[1]],
    ],
)
def test_the_fingerprint_changes_with_the_source(sources):
    assert fingerprint(RECIPE.as_dict(), sources) != fingerprint(RECIPE.as_dict(), SOURCES)


def test_a_method_of_one_width_has_it_by_default() -> None:
    assert Options(method="trellis").resolve().bits == 2
    assert Options(method="iq4-nl").resolve().bits == 4
    assert Options(method="trellis", target_bpw=2.5).resolve().bits is None
    with pytest.raises(UsageError, match="--method trellis --bits 3: the trellis code") as raised:
        Options(bits=3, method="trellis").resolve()
    assert raised.value.hint.startswith("use --bits 2")


def test_levels_are_fitted_up_to_four_bits() -> None:
    assert Options(bits=4, method="fitted").resolve().method == "fitted"
    with pytest.raises(UsageError, match="--method fitted --bits 8"):
        Options(bits=8, method="fitted").resolve()


@pytest.mark.parametrize("layout", ["bnb", "gptq", "dense"])
def test_only_layout_loftq_holds_narrow_scales(layout):
    options = Options(layout=layout, scale_dtype="int8")
    with pytest.raises(LayoutError, match="--scale-dtype int8: layout " + layout):
        options.resolve()
    assert Options(layout="loftq", scale_dtype="int8").resolve().scale_dtype == "int8"
    with pytest.raises(UsageError, match="uniform-tensor"):
        Options(method="uniform-tensor", scale_dtype="bfloat16").resolve()


def test_the_schema_of_the_manifest_has_the_recipe_of_the_table() -> None:
    """``python -m tests.support.schema`` writes that part anew."""
    schema = manifest_schema()
    assert schema["properties"]["recipe"] == recipe_schema()
    assert schema["$defs"]["layout"]["enum"] == [*registry.names(), registry.GIVEN]
    assert schema["$defs"]["method"]["enum"] == [METHOD, *methods.names()]
    # Of a backbone that is given there are other widths, and no blocks.
    assert schema["$defs"]["bits"]["enum"] == [*range(2, 9), 16, 32, 64]
    assert {*WIDTHS} <= {*schema["$defs"]["bits"]["enum"]}
    assert schema["$defs"]["block_size"]["enum"] == [0, *BLOCK_SIZES]


def test_every_entry_can_be_read_from_a_manifest_of_before_there_was_it() -> None:
    held = RECIPE.as_dict()
    for name, entry in entries().items():
        without = {key: value for key, value in held.items() if key != name}
        if not entry.required:
            assert getattr(Recipe.read(without), name) == entry.absent


def test_a_recipe_leads_to_settings_that_lead_to_it_again() -> None:
    settings = Options(bits=2, method="fitted", rank=8, include="lm_head.weight").resolve()
    recipe = Recipe.of(
        settings, threads=2, layout_fallback=None, kernels="7:tensor+float32", scale="fixed"
    )
    again = Options(**settings_of(recipe.as_dict())).resolve()
    assert again == Settings(**{**vars(settings), "threads": 2})
