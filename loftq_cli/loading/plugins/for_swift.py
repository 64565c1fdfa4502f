"""ms-swift's plugin, a file for ``external_plugins``: imported before a model is loaded."""

from __future__ import annotations

from loftq_cli.loading import hook

hook.install()
