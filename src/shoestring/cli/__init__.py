"""The command line: parse, call, print."""

import os

# Before torch starts its threads: busy waiting collapses when anything else uses the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from shoestring.cli.main import app, main

__all__ = ["app", "main"]
