"""Settings that change nothing together with others."""

from __future__ import annotations

from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from loftq_cli.settings.kinds import flag
from loftq_cli.settings.options import Options
from loftq_cli.settings.recipe import Recipe
from loftq_cli.settings.table import entries


def unused_notes(options: Options, recipe: Recipe) -> list[str]:
    """A line for each setting of ``options`` that is not the default and has no effect on what the
    resolved ``recipe`` gives."""

    def changed(name: str) -> bool:
        return bool(options.given.get(name, known[name].default) != known[name].default)

    known, found = entries(), []
    concerned = registry.layout_class(recipe.layout).settings
    if "dense_dtype" not in concerned and changed("dense_dtype"):
        found.append(("dense_dtype", f"the layout is {recipe.layout}"))
    one_scale = recipe.method != methods.AUTO and methods.method(recipe.method).one_scale
    if one_scale and "block_size" in options.given:
        found.append(("block_size", f"{recipe.method} has one scale for a whole matrix"))
    if recipe.iters == 0:
        idle = filter(changed, ("order", "svd", "stats"))
        found += [(name, "with --iters 0 the adapter is zero") for name in idle]
    return [f"{flag(name)} {options.given[name]} changes nothing: {why}" for name, why in found]
