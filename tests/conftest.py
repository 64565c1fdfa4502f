"""Signals as in a terminal: a shell starts what it puts in the background with SIGINT ignored, and
the commands that are tested would inherit that."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
