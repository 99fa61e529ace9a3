"""The commands and what they print; no logic of their own."""

from malloc_bench.cli.commands import main

__all__ = ["main"]
