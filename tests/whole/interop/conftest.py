"""Sources, conversions and consumers' results, each made once per session."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from tests.support import models, moe
from tests.whole.interop import architectures, consumer
from tests.whole.interop.cases import CASES, Case
from tests.whole.interop.expected import Output

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a case's ``source``."""

    @functools.cache
    def make(description: str) -> Path:
        kind, *details = description.split("-")
        if kind == "minilm":
            return models.minilm()
        sizes: tuple[int, ...] = ()
        dtype, options = torch.float32, {}
        for detail in details:
            if detail == "sharded":
                options = {"max_shard_size": "100KB"}
            elif "x" in detail:
                sizes = tuple(int(size) for size in detail.split("x"))
            else:
                dtype = getattr(torch, detail)
        maker: Any = functools.partial(models.bert, task="ForSequenceClassification")
        maker = getattr(models, kind, maker)
        directory = tmp_path_factory.mktemp(description)
        return models.save(maker(*sizes), directory, dtype, **options)

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family's small model; biases and norms are random, too."""
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            kind, name, settings, _ = architectures.FAMILIES[family]
            made[family] = architectures.make(kind, name, settings, tmp_path_factory.mktemp(kind))
        return made[family]

    return source


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a small mixture of experts, of one of the kinds of tests/support/moe.py."""

    @functools.cache
    def source(kind: str) -> Path:
        return models.save(moe.make(kind), tmp_path_factory.mktemp(kind))

    return source


@pytest.fixture(scope="session")
def output(
    source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Output]:
    """The conversion of a case."""
    made: dict[str, Output] = {}

    def convert(case: Case) -> Output:
        if case.name not in made:
            directory = tmp_path_factory.mktemp("outputs") / case.name
            settings = {"rank": 8, "iters": 2, "threads": 1, **case.settings}
            origin = source(case.source)
            manifest = loftq_cli.convert(origin, output=directory, layout=case.layout, **settings)
            made[case.name] = Output(case, origin, directory, manifest)
        return made[case.name]

    return convert


@pytest.fixture(scope="session")
def results(
    output: Callable[[Case], Output], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], dict[str, Any]]:
    """What the consumer of a case's layout made of it; one process per layout."""

    @functools.cache
    def consume(layout: str) -> Path:
        work = tmp_path_factory.mktemp(f"consumed-{layout}")
        jobs = [
            {
                "name": case.name,
                "directory": str(output(case).directory),
                "model_class": case.model_class,
                "dtype": case.dtype,
                "results": str(work),
                "import_loftq": layout == "loftq",
            }
            for case in CASES
            if case.layout == layout
        ]
        (work / "jobs.json").write_text(json.dumps(jobs))
        # Ours is on the path only where the consumer needs it.
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT) if layout == "loftq" else "",
            "TORCHDYNAMO_DISABLE": "1",  # gptqmodel compiles each layer for seconds
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run(
            [sys.executable, consumer.__file__, str(work / "jobs.json")],
            cwd=work,
            env=environment,
            check=True,
            capture_output=True,
            timeout=600,
        )
        return work

    def load(case: Case) -> dict[str, Any]:
        work = consume(case.layout)
        result = json.loads((work / f"{case.name}.json").read_text())
        assert "error" not in result, result["error"]
        return {**result, "tensors": load_file(work / f"{case.name}.safetensors")}

    return load


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models that are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
