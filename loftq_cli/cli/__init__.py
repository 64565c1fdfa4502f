"""The command line: one file a command, and what all of them share."""

from loftq_cli.cli.commands import main

__all__ = ["main"]
