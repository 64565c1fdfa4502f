"""Settings that change nothing together with others."""

from __future__ import annotations

from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from loftq_cli.settings.recipe import Options, Recipe


def unused_notes(options: Options, recipe: Recipe) -> list[str]:
    """A line for each setting of ``options`` that is not the default and has no effect on what the
    resolved ``recipe`` gives."""
    found = []
    concerned = registry.layout_class(recipe.layout).settings
    if "dense_dtype" not in concerned and options.dense_dtype not in (None, "source"):
        found.append(("dense_dtype", f"the layout is {recipe.layout}"))
    one_scale = recipe.method != methods.AUTO and methods.method(recipe.method).one_scale
    if one_scale and options.block_size is not None:
        found.append(("block_size", f"{recipe.method} has one scale for a whole matrix"))
    if recipe.iters == 0:
        for name, default in (("order", "quantize-first"), ("svd", "fast"), ("stats", None)):
            if getattr(options, name) not in (None, default):
                found.append((name, "with --iters 0 the adapter is zero"))
    return [
        f"--{name.replace('_', '-')} {getattr(options, name)} changes nothing: {why}"
        for name, why in found
    ]
