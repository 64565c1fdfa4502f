"""What is asked of ``loftq export``, and who carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.exporting.export import export
from loftq_cli.exporting.gguf.export import LAYOUT as GGUF
from loftq_cli.exporting.gguf.export import WantedGguf, export_gguf
from loftq_cli.exporting.mlx.export import LAYOUT as MLX
from loftq_cli.exporting.mlx.export import export_mlx
from loftq_cli.exporting.work import Wanted
from loftq_cli.machine.observer import Observer

_OF_OTHERS = (GGUF, MLX)
_NOT_FOR_THEM = ("merge", "stats", "pad-ranks", "base-model")
_ONLY_FOR = {"skeleton": GGUF, "source": GGUF, "strict": GGUF, "rounded": MLX}


@dataclass(frozen=True)
class Request:
    """Options of the command that are not for every layout: ``skeleton``, a GGUF file of the model
    in floating point; ``source``, the model that was converted, an id or a path, if the skeleton is
    of that; ``strict``: tensors that would be in 16 bits are refused; ``rounded``: what MLX's dtype
    does not hold is rounded."""

    wanted: Wanted
    skeleton: Path | None = None
    source: str | None = None
    strict: bool = False
    rounded: bool = False
    offline: bool = False

    def check(self) -> None:
        """Raise UsageError for what does not go together."""
        wanted, layout = self.wanted, self.wanted.layout
        given = {
            "merge": wanted.merge,
            "stats": wanted.stats,
            "pad-ranks": wanted.pad_ranks,
            "base-model": wanted.base_model,
            "skeleton": self.skeleton,
            "source": self.source,
            "strict": self.strict,
            "rounded": self.rounded,
        }
        for option, value in given.items():
            if value and layout in _OF_OTHERS and option in _NOT_FOR_THEM:
                raise UsageError(
                    f"--{option} is not for --layout {layout}",
                    hint="leave it out; a model merged into its codes is exported once more",
                )
            if value and layout != _ONLY_FOR.get(option, layout):
                raise UsageError(
                    f"--{option} is for --layout {_ONLY_FOR[option]}",
                    hint=f"leave out --{option}",
                )
        if layout == GGUF and self.skeleton is None:
            raise UsageError(
                f"--layout {GGUF} needs --skeleton FILE",
                hint="make it with convert_hf_to_gguf.py of llama.cpp, --outtype f16",
            )


def carry_out(
    directory: Path, output: Path, asked: Request, *, overwrite: bool, observer: Observer
) -> dict[str, Any]:
    """Write the conversion in ``directory`` to ``output`` as it is ``asked`` for; what ``--json``
    prints. Raises what the export to that layout does, and UsageError."""
    asked.check()
    wanted = asked.wanted
    if wanted.layout == MLX:
        return export_mlx(
            directory,
            output,
            adapter=wanted.adapter,
            rounded=asked.rounded,
            overwrite=overwrite,
            observer=observer,
        )
    if asked.skeleton is None:
        return export(directory, output, wanted, overwrite=overwrite, observer=observer)
    skeletal = WantedGguf(asked.skeleton, asked.source, wanted.adapter, asked.strict, asked.offline)
    return export_gguf(directory, output, skeletal, overwrite=overwrite, observer=observer)
