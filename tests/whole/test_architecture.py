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
FOLDERS = (
    *(
        "cli",
        "conversion",
        "evaluation",
        "refinement",
        "calibration",
        "exporting",
        "merging",
        "reporting",
        "planning",
        "loading",
    ),
    *("settings", "layouts", "families", "statistics", "numerics", "kernels", "checkpoint"),
    "machine",
)
FOR_ALL = {"errors", "version"}
API = {"__init__", "twins"}
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
    """The modules of this package that ``name`` imports, as keys of ``MODULES``, or names that a
    module has been asked for as text."""
    texts = (n.value for n in ast.walk(tree(name)) if isinstance(n, ast.Constant))
    named = {text for text in texts if isinstance(text, str) and text.startswith("loftq_cli.")}
    found = set()
    for module in (*imported(name), *named):
        parts = module.split(".")
        if parts[0] == "loftq_cli":
            paths = ["/".join(parts[1:end]) for end in range(len(parts), 0, -1)]
            files = (f for path in paths for f in (f"{path}.py", f"{path}/__init__.py".lstrip("/")))
            found.add(next(file for file in files if file in MODULES))
    return found - {name}


def allowed(folder: str) -> set[str]:
    """The folders, and the modules beside them, that a folder may know."""
    if folder in FOLDERS:
        return {*FOLDERS[FOLDERS.index(folder) :], "errors", *({"version"} - {folder})}
    public = {*FOLDERS[1:], *FOR_ALL}
    beside = {"__init__": {*public, "twins"}, "twins": {*public, "twins"}, "__main__": {"cli"}}
    return beside.get(folder, set())


def home(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


def test_every_folder_has_its_place() -> None:
    assert {home(name) for name in MODULES} == {*FOLDERS, *FOR_ALL, *API, "__main__"}


@every_module
def test_no_arrow_points_up(name):
    assert {home(other) for other in ours(name)} <= allowed(home(name))


def test_no_arrows_make_a_circle() -> None:
    """Of modules, wherever in them the import stands."""
    arrows = {name: ours(name) - {"__init__.py"} for name in MODULES}
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert arrows == {}


def test_no_folder_bears_the_name_of_a_public_function() -> None:
    """Importing it would put the folder in the function's place."""
    assert not {*FOLDERS} & {*loftq_cli.__all__}


def test_numerics_is_pure_torch():
    for name in MODULES:
        if name.startswith("numerics/"):
            roots = {module.split(".")[0] for module in imported(name)}
            assert roots <= {"torch", "loftq_cli", *sys.stdlib_module_names}, name


@pytest.mark.parametrize(
    ("packages", "holders"),
    [
        ({"rich"}, {"cli/console.py"}),
        ({"tqdm"}, {"cli/narrator.py"}),
        ({"click"}, {name for name in MODULES if name.startswith("cli/")}),
        ({"huggingface_hub"}, {name for name in MODULES if name.startswith("checkpoint/hub/")}),
        (
            {"transformers", "peft"},
            {
                *(f"families/{n}.py" for n in ("adaptable", "names")),
                *(f"loading/{n}.py" for n in ("beside", "load", "quantizer")),
            },
        ),
        ({"gguf", "accelerate", "tokenizers"}, set()),  # through machine/packages.py
        ({"pickle"}, {"checkpoint/pickles/reader.py"}),  # for its exception
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
    if name == "cli/console.py":
        return
    called = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
    assert not called & {"print", "sys.stdout.write", "sys.stderr.write", "click.echo"}


@every_module
def test_nothing_is_unpickled_or_executed(name):
    called = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}
    if name == "checkpoint/pickles/reader.py":
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


@pytest.mark.parametrize("program", ["import loftq_cli", HELP, "import loftq_cli.settings.recipe"])
def test_what_a_user_only_looks_at_loads_nothing_heavy(program):
    heavy = {"torch", "transformers", "huggingface_hub", "peft", "numpy", "safetensors", "rich"}
    loaded = modules_after(program)
    assert "loftq_cli" in loaded
    assert not loaded & heavy
