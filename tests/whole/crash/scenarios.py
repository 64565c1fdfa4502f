"""Small commands that write, for hundreds of accidents: each takes some hundredths of a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import loftq_cli
from loftq_cli.checkpoint.output import open_output, verify
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import prepare
from loftq_cli.conversion.run import run
from loftq_cli.exporting.export import export
from loftq_cli.exporting.work import Wanted
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from loftq_cli.settings import file as recipe_file
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.bench import Recorder

SETTINGS: Mapping[str, Any] = {
    "rank": 2,
    "iters": 1,
    "threads": 1,
    "block_size": 32,
    "layout": "loftq",
}
LAYER = "model.layers.0"


def tensors(seed: int = 0) -> checkpoints.Tensors:
    """Three matrices to convert, and three other tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (8, 32),
        f"{LAYER}.self_attn.q_proj.weight": (32, 32),
        f"{LAYER}.self_attn.v_proj.weight": (32, 32),
        f"{LAYER}.mlp.down_proj.weight": (32, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (8, 32),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def write_model(directory: Path) -> Path:
    """A checkpoint of two shards with a tokenizer."""
    model = checkpoints.write(directory, tensors(), cuts=(3,))
    (model / "tokenizer.json").write_text("{}")
    return model


@dataclass
class Scenario:
    """What one command does to ``result``, a file or directory of the directory it is given:
    ``prepare`` makes what is there before, ``command`` runs."""

    result: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], object]
    model: Path | None = None
    """The checkpoint that is converted."""
    strays: tuple[str, ...] = ()
    """Patterns of what a crash may leave beside the result for good."""
    expected: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)

    def learn(self, directory: Path) -> Scenario:
        """Run it once undisturbed, and keep what it leaves."""
        self.prepare(directory)
        self.before = self.state(directory)
        self.command(directory)
        self.expected = self.state(directory)
        shutil.rmtree(directory)
        return self

    def state(self, directory: Path) -> dict[str, Any]:
        """The files of the result, without what may differ between two runs; {} where there are
        none."""
        path = directory / self.result
        if path.is_file():
            return {"": path.read_bytes()}
        if (path / "loftq_manifest.json").exists():
            verify(open_output(path))
            return checkpoints.comparable(path)
        return checkpoints.files(path) if path.exists() else {}

    def left(self, directory: Path) -> list[str]:
        """What lies beside the result, but for strays."""
        return sorted(
            path.name
            for path in directory.iterdir()
            if path.name != self.result and not any(path.match(each) for each in self.strays)
        )


def convert(scenario: Scenario, directory: Path, recorder: Recorder | None = None) -> Recorder:
    """Run a scenario that is a conversion; what was said."""
    recorder = recorder or Recorder()
    overwrite = bool(scenario.before)
    options = Options(**SETTINGS)
    assert scenario.model is not None
    plan, path = prepare(
        Request(str(scenario.model)), directory / "out", options, observer=recorder
    )
    run(plan, path, overwrite=overwrite, observer=recorder)
    return recorder


def nothing(directory: Path) -> None:
    directory.mkdir()


def scenarios(home: Path) -> dict[str, Scenario]:
    """The scenarios by name; ``home`` is for what they read."""
    model = write_model(home / "model")
    conversion = home / "conversion"
    loftq_cli.convert(model, conversion, **SETTINGS)
    other = home / "other"
    loftq_cli.convert(model, other, **{**SETTINGS, "rank": 3})

    def converted(directory: Path) -> None:
        loftq_cli.convert(model, directory / "out", **SETTINGS)

    def converted_over(directory: Path) -> None:
        loftq_cli.convert(model, directory / "out", overwrite=True, **SETTINGS)

    def with_output(directory: Path) -> None:
        directory.mkdir()
        shutil.copytree(other, directory / "out")

    def merged(directory: Path) -> None:
        merge(conversion, directory / "out", observer=Observer())

    def merged_over(directory: Path) -> None:
        merge(conversion, directory / "out", overwrite=True, observer=Observer())

    def with_merged(directory: Path) -> None:
        directory.mkdir()
        merge(other, directory / "out", observer=Observer())

    def exported(directory: Path) -> None:
        wanted = Wanted("dense", conversion / "loftq_init", merge=True)
        export(conversion, directory / "out", wanted, observer=Observer())

    def exported_over(directory: Path) -> None:
        wanted = Wanted("loftq", base_model="me/it")
        export(conversion, directory / "out", wanted, overwrite=True, observer=Observer())

    def measured(directory: Path) -> None:
        moments = loftq_cli.Moments(32)
        moments.add(torch.eye(32))
        names = [name for name in tensors() if "layers" in name]
        path = directory / "stats.safetensors"
        loftq_cli.save_statistics(path, dict.fromkeys(names, moments), overwrite=True)

    def with_measured(directory: Path) -> None:
        directory.mkdir()
        moments = loftq_cli.Moments(32)
        moments.add(2 * torch.eye(32))
        loftq_cli.save_statistics(directory / "stats.safetensors", {"a.weight": moments})

    def saved(directory: Path) -> None:
        recipe_file.save(directory / "recipe.toml", open_output(conversion).manifest["recipe"])

    def with_saved(directory: Path) -> None:
        directory.mkdir()
        recipe_file.save(directory / "recipe.toml", open_output(other).manifest["recipe"])

    return {
        "convert": Scenario("out", nothing, converted, model),
        "convert --overwrite": Scenario("out", with_output, converted_over, model),
        "merge": Scenario("out", nothing, merged),
        "merge --overwrite": Scenario("out", with_merged, merged_over),
        "export": Scenario("out", nothing, exported),
        "export --overwrite": Scenario("out", with_output, exported_over),
        "statistics": Scenario("stats.safetensors", with_measured, measured),
        "recipe": Scenario("recipe.toml", with_saved, saved, strays=(".recipe.toml.*.tmp",)),
    }
