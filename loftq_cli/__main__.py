"""``python -m loftq_cli``."""

from loftq_cli.cli import main

main(prog_name="loftq")
