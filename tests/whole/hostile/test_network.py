"""A local conversion asks nobody anything, and runs no code of the checkpoint."""

from __future__ import annotations

import subprocess
import sys

from tests.support import checkpoints

PROGRAM = """
import os, sys
def refuse(event, args):
    if event.startswith("socket."):
        print("a socket was used:", event, args, file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(refuse)
from loftq_cli.cli import main
options = ["--rank", "4", "--iters", "1", "-t", "1", "-q"]
main(["convert", sys.argv[1], "-o", "out", *options], standalone_mode=False)
main(["inspect", "out", "--verify"], standalone_mode=False)
main(["error-report", "out", "--source", sys.argv[1]], standalone_mode=False)
assert "huggingface_hub" not in sys.modules, "the hub's client was loaded"
assert "transformers" not in sys.modules, "transformers was loaded"
assert "modeling_evil" not in sys.modules
"""


def test_a_local_conversion_opens_no_socket_and_runs_no_code_of_the_checkpoint(tmp_path):
    config = checkpoints.LLAMA | {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"},
        "trust_remote_code": True,
    }
    directory = checkpoints.write(tmp_path / "model", checkpoints.llama(), config)
    evil = f"open({str(tmp_path / 'exploded')!r}, 'w')\n"
    for name in ("modeling_evil.py", "setup.py", "sitecustomize.py", "LICENSE_evil.py"):
        (directory / name).write_text(evil)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert not list((tmp_path / "out").rglob("*.py"))
