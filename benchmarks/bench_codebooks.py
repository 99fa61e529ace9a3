"""What the search for sums of codebook entries takes beside the same search in plain torch. `make bench`, or by itself:

    python benchmarks/bench_codebooks.py [--vectors 1024] [--seconds 3]

Vectors of one head by chance, codebooks of 256 entries that shrink from one to the next, one thread; both give the
same codes. Calls take turns; the ratio is the median of CPU times of the same round.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from malloc_bench import kernels
from malloc_bench.measure import interleaved, load, ratio, summary, threads
from malloc_bench.state import Codebook
from malloc_bench.training.fit import tune_malloc

SHAPES = tuple((stages, width, beam) for stages in (4, 12) for width in (25, 50) for beam in (2, 4, 8))


def row(stages: int, width: int, beam: int, vectors: int, seconds: float) -> list[str]:
    torch.manual_seed(0)
    shrinks = torch.linspace(1, 0.2, stages).view(1, -1, 1, 1)
    book = Codebook(torch.randn(1, stages, 256, width) * shrinks, 8, width, added=True)
    x = torch.randn(vectors, 1, 1, width)

    def plain() -> torch.Tensor:
        with kernels.eager():
            return book.nearest(x, beam)

    alike = (book.nearest(x, beam) == plain()).float().mean()
    assert alike > 0.99, f"{alike:.1%} of the codes are the same"  # the rest: ties by rounding
    found = interleaved({"loop": partial(book.nearest, x, beam), "torch": plain}, seconds=seconds, repeats=5)
    middle = ratio(found["loop"].cpu, found["torch"].cpu)
    times = (f"{1e3 * summary(each.cpu)['p50'] / vectors:.1f}" for each in (found["loop"], found["torch"]))
    return [str(stages), str(width), str(beam), *times, f"{middle.value:.2f} ({middle.lo:.2f} - {middle.hi:.2f})"]


@torch.inference_mode()
def report(vectors: int = 1024, seconds: float = 3.0) -> None:
    tune_malloc()
    print("# Sums of codebook entries, by `python benchmarks/bench_codebooks.py`\n")
    print(f"{vectors:,} vectors, CPU time, one thread, load {load():.1f}; torch {torch.__version__}.\n")
    heads = ["codebooks", "width", "beam", "loop, us a vector", "torch, us", "loop / torch"]
    for cells in (heads, ["--:"] * len(heads)):
        print(f"| {' | '.join(cells)} |")
    with threads(1):
        for shape in SHAPES:
            print(f"| {' | '.join(row(*shape, vectors, seconds))} |", flush=True)


def test_codebooks(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3.0)
    report(**vars(parser.parse_args()))
