"""Laws of size, data, memory and compression, fitted to the rows of a run and judged by what they predict."""

from malloc_bench.report.laws.laws import LAWS, fitted
from malloc_bench.report.laws.told import drawn, told

__all__ = ["LAWS", "drawn", "fitted", "told"]
