"""A suite: its YAML file, the parts and cells it names, and the plan of what is left to do."""

from malloc_bench.suite.suite import Cell, Measure, Part, Suite, SuiteError, load_suite, only

__all__ = ["Cell", "Measure", "Part", "Suite", "SuiteError", "load_suite", "only"]
