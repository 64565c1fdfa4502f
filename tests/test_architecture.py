"""The shape of the house: who may import whom, who may print, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loftq_cli

ROOT = Path(loftq_cli.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
# From the top of the house to its cellar: each folder knows itself and those below it.
FOLDERS = ("conversion", "reporting", "integrations", "layouts", "checkpoint", "numerics")
FOR_ALL = {"errors", "maps", "paths", "recipe", "version"}
MOST_LINES = 400

every_module = pytest.mark.parametrize("name", MODULES)


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text("utf-8"))


def imported(name: str) -> Iterator[str]:
    """Every module that ``name`` imports anywhere, with its full dotted name."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> set[str]:
    """The parts of this package that ``name`` imports: first name below loftq_cli."""
    return {module.split(".")[1] for module in imported(name) if module.startswith("loftq_cli.")}


def allowed(name: str) -> set[str]:
    """What the module ``name`` may import of ours."""
    folder, slash, _ = name.partition("/")
    if slash:
        below = set(FOLDERS[FOLDERS.index(folder) :])
        return below | (FOR_ALL if folder != "numerics" else {"errors"})
    return {
        "__init__.py": {*FOLDERS, *FOR_ALL},
        "__main__.py": {"cli"},
        "cli.py": {
            *FOLDERS,
            *FOR_ALL,
            "console",
            "command",
            "narrator",
            "cli_calibrate",
            "cli_convert",
            "cli_push",
        },
        "cli_calibrate.py": {*FOLDERS, *FOR_ALL, "console", "command", "narrator"},
        "cli_convert.py": {*FOLDERS, *FOR_ALL, "console", "command", "narrator"},
        "cli_push.py": {*FOLDERS, *FOR_ALL, "console", "command", "narrator"},
        "command.py": {*FOR_ALL, "console", "streams"},
        "console.py": {*FOR_ALL, "streams"},
        "narrator.py": {"conversion", "console", *FOR_ALL},
        "errors.py": set(),
        "maps.py": {"errors"},
        "paths.py": {"errors"},
        "recipe.py": {"errors", "maps", "paths"},
        "streams.py": set(),
        "version.py": set(),
    }[name]


@every_module
def test_no_arrow_points_up(name):
    assert ours(name) <= allowed(name)


def test_of_the_conversion_the_narrator_knows_the_observer_only():
    modules = {module for module in imported("narrator.py") if ".conversion" in module}
    assert modules == {"loftq_cli.conversion.observer.Observer"}


def test_numerics_is_pure_torch():
    for name in MODULES:
        if name.startswith("numerics/"):
            roots = {module.split(".")[0] for module in imported(name)}
            assert roots <= {"torch", "loftq_cli", *sys.stdlib_module_names}, name


@pytest.mark.parametrize(
    ("packages", "holders"),
    [
        ({"rich"}, {"console.py"}),
        ({"tqdm"}, {"narrator.py"}),
        ({"click"}, {"cli.py", "cli_calibrate.py", "cli_convert.py", "cli_push.py", "command.py"}),
        ({"huggingface_hub"}, {name for name in MODULES if name.startswith("checkpoint/hub")}),
        (
            {"transformers", "peft"},
            {f"integrations/{name}.py" for name in ("beside", "loading", "names", "quantizer")},
        ),
        ({"gguf", "accelerate", "psutil", "tokenizers"}, set()),  # through checkpoint/extras.py
        ({"pickle"}, {"checkpoint/pickled.py"}),  # for its exception
        ({"numpy", "bitsandbytes", "gptqmodel", "safetensors"}, set()),
    ],
)
def test_a_library_is_confined_to_the_modules_that_it_is_for(packages, holders):
    users = {
        name for name in MODULES if {module.split(".")[0] for module in imported(name)} & packages
    }
    assert users <= holders


@every_module
def test_only_the_console_prints(name):
    if name == "console.py":
        return
    called = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
    assert not called & {"print", "sys.stdout.write", "sys.stderr.write", "click.echo"}


@every_module
def test_nothing_is_unpickled_or_executed(name):
    called = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}
    if name == "checkpoint/pickled.py":
        forbidden.remove("torch.load")
        loads = [n for n in ast.walk(tree(name)) if isinstance(n, ast.Call)]
        (load,) = [n for n in loads if ast.unparse(n.func) == "torch.load"]
        assert "weights_only=True" in map(ast.unparse, load.keywords)
    assert not called & forbidden


@every_module
def test_a_module_says_what_it_is_and_stays_readable(name):
    text = MODULES[name].read_text("utf-8")
    assert text == "" or ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MOST_LINES


def modules_after(program: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter holds after ``program``."""
    program += "\nimport sys; print('MODULES', *{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(run.stdout.rpartition("MODULES")[2].split())


HELP = """
from loftq_cli.cli import main
for command in ([], ["convert"], ["inspect"], ["error-report"], ["calibrate"], ["push"]):
    main([*command, "--help"], standalone_mode=False)
"""


@pytest.mark.parametrize("program", ["import loftq_cli", HELP, "import loftq_cli.recipe"])
def test_what_a_user_only_looks_at_loads_nothing_heavy(program):
    heavy = {"torch", "transformers", "huggingface_hub", "peft", "numpy", "safetensors", "rich"}
    loaded = modules_after(program)
    assert "loftq_cli" in loaded
    assert not loaded & heavy
