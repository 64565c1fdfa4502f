"""The group of all commands."""

from __future__ import annotations

import click

from loftq_cli.cli.adapt import adapt
from loftq_cli.cli.calibrate import calibrate
from loftq_cli.cli.compare import compare
from loftq_cli.cli.convert import convert
from loftq_cli.cli.error_report import error_report
from loftq_cli.cli.evaluate import evaluate
from loftq_cli.cli.export import export
from loftq_cli.cli.guard import CONTEXT, Commands
from loftq_cli.cli.import_adapter import import_adapter
from loftq_cli.cli.inspect import inspect
from loftq_cli.cli.merge import merge
from loftq_cli.cli.plan import plan
from loftq_cli.cli.push import push
from loftq_cli.cli.refine import refine
from loftq_cli.version import VERSION


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(VERSION, prog_name="loftq")
def main() -> None:
    """Turn a checkpoint into a quantized backbone plus a LoRA adapter that already makes up for
    the quantization (LoftQ).

    \b
    loftq convert meta-llama/Llama-2-7b --bits 2 --rank 64 --iters 5
    loftq inspect out/
    loftq error-report
    """


for _command in (
    *(merge, export, inspect, error_report, compare, convert, calibrate, evaluate, push),
    *(refine, adapt, import_adapter, plan),
):
    main.add_command(_command)
