"""What selecting slots costs beside kvpress on the same tensors, in one process. `make bench`, or by itself:

    python benchmarks/bench_selection.py [--users 16] [--slots 4096] [--kept 1024] [--seconds 5]

Timed, one thread: scores, the choice of k slots a head, and the gathering of their keys and values; `compress` of a
fresh Prefill of tensors here, `compress` of a press there, with equal parameters. Both begin with the same keys, values
and, as the row says, the window's weights or the queries, of which both make weights (the press's map to queries is the
identity, its rotation turns by nothing); that product and its softmax, alike on both sides, are more than half of our
time. Of queries kvpress takes all, ours the newest; equal numbers of them are rows of their own. Calls take turns; the
ratio is the median of CPU times of the same round. Goal: at most 0.5 each. kvpress (0.5.5) is optional: without it ours
alone are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import interleaved, load, ratio, summary, threads
from malloc_bench.state import Prefill
from malloc_bench.training.fit import tune_malloc

try:
    import kvpress
except ImportError:
    kvpress = None

HEADS, WIDTH = 2, 64


@dataclass(frozen=True)
class Row:
    """A method here and its press there. window: given are the weights of so many queries, not the queries themselves.
    queries: so many of the newest are what the press sees (None: all)."""

    name: str
    params: dict[str, Any]
    press: str
    theirs: dict[str, Any]
    said: str = ""
    window: int = 0
    queries: int | None = None

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.params.items())]) + self.said


def rows(slots: int) -> Iterator[Row]:
    observers: list[tuple[str, dict[str, Any], str, dict[str, Any], int]] = [
        ("snapkv", {"window": size}, "SnapKVPress", {"window_size": size}, size) for size in (16, 64)
    ]
    for *names, size in [*observers, ("tova", {}, "TOVAPress", {}, 1)]:
        yield Row(*names, said=", of weights", window=size)  # type: ignore[misc]
        yield Row(*names, said=", of queries")  # type: ignore[misc]
    yield Row("keydiff", {}, "KeyDiffPress", {})
    for window, queries, said in ((64, None, ", theirs all"), (64, 64, ""), (slots, None, "")):
        theirs = {"n_sink": 0, "n_future_positions": 1}  # mean rotations cost time and turn nothing here
        yield Row("expected_attention", {"window": window}, "ExpectedAttentionPress", theirs, said, queries=queries)
    for lag in (16, 128):
        yield Row("lagkv", {"lag": lag}, "LagKVPress", {"lag_size": lag})


def here(row: Row, keys: Tensor, values: Tensor, queries: Tensor, weights: Tensor, kept: int) -> Callable[[], object]:
    method, budget = get_compressor(row.name, **row.params), Budget(slots=kept)

    def call() -> object:
        if not row.window:
            return method.compress(Prefill.from_tensors([keys], [values], [queries]), budget)
        return method.compress(replace(Prefill.from_tensors([keys], [values]), window=[weights]), budget)

    return call


def there(row: Row, keys: Tensor, values: Tensor, queries: Tensor, weights: Tensor, kept: int) -> Callable[[], object]:
    slots = keys.shape[2]
    config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    config.num_key_value_groups, config.hidden_size = 1, HEADS * WIDTH
    rotation = torch.ones(1, slots, WIDTH), torch.zeros(1, slots, WIDTH)
    module = SimpleNamespace(
        config=config, head_dim=WIDTH, layer_idx=0, num_key_value_groups=1, q_proj=torch.nn.Identity(),
        rotary_emb=lambda x, ids: tuple(each[:, : ids.shape[1]] for each in rotation),
    )  # fmt: skip
    hidden = queries.transpose(1, 2).flatten(2)[:, -(row.queries or slots) :].contiguous()
    press = getattr(kvpress, row.press)(1 - (kept + 0.5) / slots, **row.theirs)  # int() truncates: half a slot away
    given = weights if row.window else None
    return lambda: press.compress(module, hidden, keys, values, given, {"position_embeddings": rotation})


def newest_weights(keys: Tensor, queries: Tensor, window: int) -> Tensor:
    """Causal softmax weights of the newest queries, [B, H, window, S]."""
    logits = queries[:, :, -window:] @ keys.mT / keys.shape[-1] ** 0.5
    future = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


@torch.inference_mode()
def report(users: int = 16, slots: int = 4096, kept: int = 1024, seconds: float = 5.0) -> None:
    tune_malloc()
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(users, HEADS, slots, WIDTH, generator=generator) for _ in range(3)]
    where = f"kvpress {version('kvpress')}" if kvpress else "kvpress is not installed: ours alone"
    print("# Selecting slots beside kvpress, by `python benchmarks/bench_selection.py`\n")
    shape = f"{users} users x {HEADS} heads x {WIDTH}"
    print(f"Scores, choice and gathering of {kept:,} of {slots:,} slots, {shape}, float32.")
    print(f"CPU time, one thread, load {load():.1f}; torch {torch.__version__}, {where}.")
    print("\n| method | ours, ms | kvpress, ms | ratio | 95 % |")
    print("|---|--:|--:|--:|--:|")
    with threads(1):
        for row in rows(slots):
            weights = newest_weights(given[0], given[2], max(1, row.window))
            calls = {"ours": here(row, *given, weights, kept)}
            if kvpress:
                calls["theirs"] = there(row, *given, weights, kept)
            found = interleaved(calls, seconds=seconds, repeats=5)
            cells = [f"{summary(each.cpu)['p50']:.1f}" for each in found.values()]
            if kvpress:
                middle = ratio(found["ours"].cpu, found["theirs"].cpu)
                cells += [f"{middle.value:.2f}", f"{middle.lo:.2f} - {middle.hi:.2f}"]
            print(f"| {' | '.join([row.label, *cells, *[''] * (4 - len(cells))])} |", flush=True)


def test_selection(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("--users", 16), ("--slots", 4096), ("--kept", 1024)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--seconds", type=float, default=5.0)
    report(**vars(parser.parse_args()))
