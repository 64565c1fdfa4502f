"""The version of the package, as the manifest and ``--version`` state it."""

VERSION = "0.1.0"
