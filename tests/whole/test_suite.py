"""The suite itself: the targets of make, which tests are slow, and that none disturbs another."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import _python_dispatch

import loftq_cli
from tests.support.slow import FOLDERS, MODULES, TESTS, is_slow
from tests.support.state import restored, seen
from tests.support.where import TESTED_BY

ROOT = TESTS.parent
BESIDE = {"benchmarks", "support", "whole"}
TARGETS = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"))


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_help_says_what_every_target_is_for() -> None:
    said = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    explained = dict(re.findall(r"(?m)^make ([a-z-]+)\n((?:  .+\n)+)", said))
    assert list(explained) == TARGETS
    assert {"help", "test", "quick", "check"} <= set(TARGETS)
    assert all(len(text.split()) > 1 for text in explained.values())


def test_every_target_that_is_no_file_is_phony() -> None:
    (phony,) = re.findall(r"(?m)^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"))
    assert set(phony.split()) == set(TARGETS)


def test_the_quick_ones_are_of_every_folder_but_the_slow_ones() -> None:
    modules = list(TESTS.rglob("test_*.py"))
    folders = {path.parent.relative_to(TESTS).as_posix() for path in modules}
    quick = {path.parent.relative_to(TESTS).as_posix() for path in modules if not is_slow(path)}
    assert folders - quick == {*FOLDERS, "whole"} & folders
    assert all((TESTS / name).is_dir() for name in FOLDERS)
    assert all((TESTS / name).is_file() for name in MODULES)


@pytest.mark.parametrize(
    ("line", "slow"),
    [
        ("import subprocess", True),
        ("    import transformers", True),
        ("from tests.support import checkpoints, models, moe", True),
        ("from tests.support.models import bert", True),
        ("from tests.support import checkpoints", False),
        ("# transformers", False),
    ],
)
def test_a_module_is_slow_by_what_it_imports(line: str, slow: bool, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("tests.support.slow.TESTS", tmp_path)
    path = tmp_path / "test_it.py"
    path.write_text(f"import json\n{line}\n")
    assert is_slow(path) == slow


def test_no_module_of_tests_is_longer_than_400_lines() -> None:
    long = {path for path in TESTS.rglob("*.py") if path.read_text("utf-8").count("\n") > 400}
    assert long == set()


def test_what_a_test_changes_is_as_it_was_for_the_next() -> None:
    before = seen()
    with restored():
        os.environ["LOFTQ_OF_A_TEST"] = "1"
        os.environ.pop("PATH", None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gc.disable()
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("medium")
        _python_dispatch._is_in_torch_dispatch_mode = True
        os.umask(before["umask"] ^ 0o077)
        assert not [name for name, value in seen().items() if value == before[name]]
    assert seen() == before


def test_random_numbers_do_not_depend_on_what_ran_before() -> None:
    drawn = []
    for count in (1, 2):
        with restored():
            drawn.append(torch.rand(3))
            torch.rand(count)
    assert torch.equal(*drawn)


def test_the_test_of_a_module_is_found_by_its_name_or_in_the_list() -> None:
    package = Path(loftq_cli.__file__).parent
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    named = {path for path in modules if (TESTS / path.parent / f"test_{path.name}").is_file()}
    others = {path.as_posix() for path in modules - named if not path.name.startswith("__")}
    assert others == TESTED_BY.keys()
    assert all((TESTS / test).is_file() for test in TESTED_BY.values())


def test_folders_of_tests_mirror_those_of_the_package() -> None:
    package = Path(loftq_cli.__file__).parent
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    mirrors = {path for path in folders if path.parts and path.parts[0] not in BESIDE}
    assert all((package / path / "__init__.py").is_file() for path in mirrors)
