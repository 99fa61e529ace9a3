"""One user, many items: all candidates in one read of a state beside a row for each. `make bench`, or by itself:

    python benchmarks/bench_turbo.py [backbone ...] [--device cpu|cuda] [--lengths 512 2048] [--candidates 1 16 ...]

Three tables, every backbone of one size (bench_backbones.SIZE), fresh weights, one user (Climber's acceleration, arXiv
2502.09888, which claims 5.15x in training; M-FALCON of HSTU):

serving   naive: a plain forward pass over the history with the candidate as its last event, a row each, in batches of
          EVENTS. Rows do not depend on one another, so at most two batches are timed; the rest is a product. TURBO:
          prefill once and read all candidates at once; cached: the read alone. Both compute what naive does, for every
          backbone: the largest difference on the rows timed is printed, and must be small.
limit     the read alone as candidates become more: their number a second, as a share of the most, and in GFLOP/s.
training  forward and backward of the ranking loss: one user with M candidates against M users with one each.

Times are medians of calls in turns, one thread; on a busy machine CPU time (the figures in brackets) says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from statistics import median

import pytest
import torch
from bench_backbones import SIZE, make
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.measure import Samples, Workload, interleaved, load, threads
from malloc_bench.registry import names
from malloc_bench.state import Events, map_tensors
from malloc_bench.training.fit import tune_malloc

ITEMS = 3706
EVENTS = {"cpu": 1 << 13, "cuda": 1 << 19}  # of a naive batch: on a CPU more are not faster
LENGTHS, CANDIDATES, MORE, MERGED = (512, 2048), (1, 16, 128, 1024), (4096, 16384), (4, 16, 64)
CLOSE = 1e-4


def build(name: str, length: int, device: str) -> Backbone:
    return make(name, ITEMS, True, **{**SIZE, "max_length": length + 1}).to(device).eval()


def ask(length: int, candidates: int, device: str) -> tuple[Events, Events]:
    """The history of one user and its candidates, all asked for at one time."""
    return Workload(1, length, candidates).events(ITEMS, device)[:2]


def rows(history: Events, tokens: Events, of: slice) -> Events:
    """A row [n + 1] for each candidate: the history with the candidate behind it."""
    some = {name: x[:, of] for name, x in tokens.columns().items()}
    line = {k: torch.cat([x.expand(some[k].shape[1], -1), some[k].mT], 1) for k, x in history.columns().items()}
    return Events(count=torch.full_like(line["items"][:, 0], line["items"].shape[1]), **line)


def batch(history: Events) -> int:
    """Rows of a naive batch."""
    return max(1, EVENTS[history.items.device.type] // (history.items.shape[1] + 1))


def naive(backbone: Backbone, history: Events, tokens: Events) -> Tensor:
    """Outputs [1, M, d] of a row each, batch after batch."""
    size = batch(history)
    batches = (slice(start, start + size) for start in range(0, tokens.items.shape[1], size))
    return torch.cat([backbone(rows(history, tokens, each))[:, -1] for each in batches])[None]


def turbo(backbone: Backbone, history: Events, tokens: Events) -> Tensor:
    return backbone.read(tokens, backbone.prefill(history).state)


def timed(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, Samples]:
    return interleaved(calls, device, seconds=0.3, repeats=repeats)


def speed(samples: Samples, candidates: int) -> str:
    return f"{candidates / median(samples.wall):,.0f} ({candidates / median(samples.cpu):,.0f})"


def gain(slow: Samples, fast: Samples, factor: float = 1.0) -> str:
    """How many times faster, by wall time and, in brackets, by CPU time: the median of the rounds."""
    wall, cpu = (median(a / b for a, b in zip(*each)) for each in ((slow.wall, fast.wall), (slow.cpu, fast.cpu)))
    return f"{factor * wall:.2f} ({factor * cpu:.2f})"


def serving(name: str, length: int, candidates: int, device: str, repeats: int) -> list[str]:
    backbone, (history, tokens) = build(name, length, device), ask(length, candidates, device)
    part = min(candidates, 2 * batch(history))
    few = map_tensors(lambda x: x[:, :part] if x.dim() == 2 else x.clamp(max=part), tokens)
    state = backbone.prefill(history).state
    far = float((naive(backbone, history, few) - turbo(backbone, history, few)).abs().max())
    assert far < CLOSE, f"{name}: a read is {far:.1e} away from the plain pass"
    found = timed(
        {
            "naive": partial(naive, backbone, history, few),
            "turbo": partial(turbo, backbone, history, tokens),
            "cached": partial(backbone.read, tokens, state),
        },
        device,
        repeats,
    )
    cells = [name, f"{length:,}", f"{candidates:,}", str(part), speed(found["naive"], part)]
    for each in ("turbo", "cached"):
        cells += [speed(found[each], candidates), gain(found["naive"], found[each], candidates / part)]
    return [*cells, f"{far:.0e}"]


def limit(name: str, length: int, candidates: Sequence[int], device: str, repeats: int) -> list[list[str]]:
    """A line for each number of candidates; beside a read the product with the catalogue, which retrieval adds to it.

    Shares and rates are by CPU time where the CPU does the work.
    """
    backbone, lines = build(name, length, device), []
    state = backbone.prefill(ask(length, 1, device)[0]).state
    table, found = backbone.catalogue(), {}
    for m in candidates:
        tokens = ask(length, m, device)[1]
        hidden = backbone.read(tokens, state)[0]
        calls = {"read": partial(backbone.read, tokens, state), "catalogue": lambda h=hidden: h @ table.T}
        found[m] = timed(calls, device, repeats)
    took = {m: {k: median(x.cpu if device == "cpu" else x.wall) for k, x in each.items()} for m, each in found.items()}
    most = max(m / took[m]["read"] for m in candidates)
    for m in candidates:
        seconds, flops = took[m]["read"], backbone.flops("read", m, state)
        rate = "" if flops is None else f"{flops / seconds / 1e9:.1f}"
        share = f"{m / seconds / most:.0%}"
        catalogue = f"{took[m]['catalogue'] / seconds:.2f}"
        lines.append([name, f"{length:,}", f"{m:,}", speed(found[m]["read"], m), share, rate, catalogue])
    return lines


def product(device: str) -> float:
    """GFLOP/s of a square product, what the machine can do just now."""
    x = torch.randn(1024, 1024, device=device)
    found = timed({"": lambda: x @ x}, device, 5)[""]
    return 2 * 1024**3 / median(found.cpu if device == "cpu" else found.wall) / 1e9


def training(name: str, length: int, merged: int, device: str, repeats: int) -> list[str]:
    torch.manual_seed(0)
    backbone = build(name, length, device).for_ranking()
    history, tokens = ask(length, merged, device)
    labels = torch.arange(merged, device=device)[None] % 2 == 0
    many = map_tensors(lambda x: x.expand(merged, *x.shape[1:]).contiguous(), history)
    apart = map_tensors(lambda x: x.mT.contiguous() if x.dim() == 2 else torch.ones_like(many.count), tokens)

    def step(history: Events, tokens: Events, labels: Tensor) -> Tensor:
        backbone.zero_grad(set_to_none=True)
        loss = backbone.ranking_loss(history, tokens, labels)
        loss.backward()
        return loss.detach()

    calls = {"rows": partial(step, many, apart, labels.T), "merged": partial(step, history, tokens, labels)}
    far = abs(float(calls["rows"]() - calls["merged"]()))
    assert far < CLOSE, f"{name}: the loss of one user is {far:.1e} away from that of {merged}"
    backbone.train()  # with its dropout
    found = timed(calls, device, repeats)
    speeds = [speed(found[each], merged) for each in ("rows", "merged")]
    return [name, f"{length:,}", str(merged), *speeds, gain(found["rows"], found["merged"]), f"{far:.0e}"]


def table(title: str, columns: str, lines: Iterable[Sequence[str]]) -> None:
    """Prints each line as soon as it is measured."""
    head = columns.split("|")
    print(f"\n{title}\n")
    for cells in chain((head, ["---"] + ["--:"] * (len(head) - 1)), lines):
        print(f"| {' | '.join(cells)} |", flush=True)


def report(
    chosen: Sequence[str] = (),
    device: str = "cpu",
    lengths: Sequence[int] = LENGTHS,
    candidates: Sequence[int] = CANDIDATES,
    more: Sequence[int] = MORE,
    merged: Sequence[int] = MERGED,
    repeats: int = 3,
) -> None:
    tune_malloc()
    labels = list(chosen) or names("backbones")
    size = ", ".join(f"{key} {SIZE[key]}" for key in ("layers", "heads", "dim"))
    pairs = [(name, n) for name in labels for n in lengths]
    with threads(1):
        print(f"\n{size}; {device}, 1 thread, load {load():.1f}; figures by wall (CPU) time")
        with torch.inference_mode():
            table(
                "Serving: candidates a second (naive: of the rows timed).",
                "backbone|events|candidates|rows timed|naive|TURBO|x naive|cached|x naive|difference",
                (serving(*pair, m, device, repeats) for pair in pairs for m in candidates),
            )
            rate = f"{product(device):.0f} GFLOP/s"
            table(
                f"The read alone; a product of 1,024 x 1,024 here: {rate}; catalogue: {ITEMS:,} items, in reads.",
                "backbone|events|candidates|candidates/s|of the most|GFLOP/s|catalogue",
                chain.from_iterable(limit(*pair, (*candidates, *more), device, repeats) for pair in pairs),
            )
        table(
            "Training: candidates a second, forward and backward.",
            "backbone|events|candidates|a row each|one user|x|loss difference",
            (training(name, lengths[0], m, device, repeats) for name in labels for m in merged),
        )
        print(f"\nload {load():.1f} at the end")


@pytest.mark.parametrize("name", names("backbones"))
def test_turbo(benchmark, name: str) -> None:
    benchmark.pedantic(report, ([name],), rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", help="all that are registered, if none is named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    for option, default in (("lengths", LENGTHS), ("candidates", CANDIDATES), ("more", MORE), ("merged", MERGED)):
        parser.add_argument(f"--{option}", type=int, nargs="+", default=default)
    given = vars(parser.parse_args())
    report(given.pop("backbones"), **given)
