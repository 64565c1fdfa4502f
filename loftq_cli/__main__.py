"""``python -m loftq_cli``."""

from loftq_cli.cli.commands import main

main(prog_name="loftq")
