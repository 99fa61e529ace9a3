"""Items that come to the catalogue after a state was fitted: are they read, and found, as well? Of trained backbones.

    python examples/later.py [fitted_small] [--users 256] [--budget 1/32]        after `malloc-bench run fitted_small`

A tenth of the items, the newest (by their first training event) or the rarest, are kept from the 128 probes that
`fit_omp` + `mxint` is fitted to: drawn `by events`, or any `of the others` alike; beside them any `of all`, some of the
tenth among them. Overlap@10 with the full state's list, means over users: `readers`, where the newest event is each of
32 items that are no probes, of the others and of the tenth; `candidates`, where the user's own newest event reads: the
ten best of as many of the others as the tenth has items, and of the tenth. The backbone was trained with all of them:
what is asked is what the fit misses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from why import backbones

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import ends, facts
from malloc_bench.evaluation.evaluate import asked_of
from malloc_bench.state import Stats

SHARE, PROBES, READERS = 10, 128, 32
Lots = Mapping[str, np.ndarray]  # items: readers and candidates, of the others and of the tenth


def tenths(split: Split) -> dict[str, np.ndarray]:
    """Item ids of the newest and of the rarest tenth of those that have trained."""
    data = split.dataset
    places = np.flatnonzero(np.arange(data.n_events) < np.repeat(ends(split), np.diff(data.offsets)))
    order = places if data.times is None else places[np.argsort(data.times[places], kind="stable")]
    found, first, count = np.unique(data.items[order], return_index=True, return_counts=True)
    most = len(found) // SHARE
    return {"newest": found[np.argsort(-first)[:most]], "rarest": found[np.argsort(count, kind="stable")[:most]]}


def fits(split: Split, late: np.ndarray) -> tuple[dict[str, Compressor], Lots]:
    """The method fitted to probes with and without late items, and what reads its states and is looked for."""
    items, dice = facts(split, Stats(probes=split.dataset.n_items)), np.random.default_rng(0)
    assert items is not None
    drawn = items["probes"].numpy()
    lot, late = dice.permutation(drawn), dice.permutation(late)
    others = lot[~np.isin(lot, late)]
    readers = np.concatenate([others[:READERS], late[:READERS]])
    lots = {
        "readers, others": others[:READERS],
        "readers, tenth": late[:READERS],
        "candidates, others": others[-len(late) :],
        "candidates, tenth": late,
    }
    probes = {"by events": drawn[~np.isin(drawn, late)], "of the others": others, "of all": lot}
    chosen = {name: x[~np.isin(x, readers)][:PROBES].tolist() for name, x in probes.items()}
    ways = {name: {"probes": len(ids), "which": tuple(ids)} for name, ids in chosen.items()}
    return {name: get_compressor("compose", steps=[{"fit_omp": way}, "mxint"]) for name, way in ways.items()}, lots


def kept(scores: Tensor, full: Tensor) -> Tensor:
    """Overlap of the ten best, [B]; scores and full [B, M, items]."""
    one, other = (x.topk(10).indices for x in (scores, full))
    return (one.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).float().mean((1, 2))


def overlaps(
    backbone: Backbone, split: Split, methods: Mapping[str, Compressor], lots: Lots, budget: Budget, users: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Chunk by chunk, of each method: overlap [B] by lot."""
    needs = Stats()
    for method in methods.values():
        needs |= method.needs
    items, chosen = facts(split, needs), np.random.default_rng(0).permutation(len(split.test))[:users]
    for rows in np.array_split(chosen, -(-len(chosen) // 64)):
        asked = asked_of(backbone, split, rows, False)
        ids = torch.from_numpy(split.dataset.user_ids[split.test.users[rows]])
        prefill = backbone.prepare(asked.history, ids, needs, 0, items, asked.tokens)
        readers = {
            name: torch.from_numpy(lot).int().expand(len(rows), -1) for name, lot in lots.items() if "read" in name
        }
        readers |= {name: asked.tokens.items for name in lots if "read" not in name}
        states = {"full": prefill.state} | {name: each.compress(prefill, budget) for name, each in methods.items()}
        scores: dict[str, dict[str, Tensor]] = {}
        for name, state in states.items():
            for lot, read in readers.items():
                count = torch.full_like(asked.tokens.count, read.shape[1])
                tokens = asked.tokens.each(lambda x, read=read: x.expand(-1, read.shape[1]), count)
                found = backbone.read(replace(tokens, items=read), state) @ backbone.catalogue().mT
                some = torch.from_numpy(lots[lot]) - 1 if "candidates" in lot else slice(None)
                scores.setdefault(name, {})[lot] = found[..., some]
        for name in methods:
            yield name, {lot: kept(scores[name][lot], scores["full"][lot]) for lot in lots}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="fitted_small")
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 32))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| backbone | tenth | probes | readers: others / tenth | candidates: others / tenth |")
    print("|---|---|---|--:|--:|")
    for name, backbone, split in backbones(asked.suite, asked.seed):
        for which, late in tenths(split).items():
            methods, lots = fits(split, late)
            rows: dict[str, list[dict[str, Tensor]]] = {method: [] for method in methods}
            for method, row in overlaps(backbone, split, methods, lots, Budget(float(asked.budget)), asked.users):
                rows[method].append(row)
            for method, found in rows.items():
                mean = {lot: float(torch.cat([row[lot] for row in found]).mean()) for lot in lots}
                cells = [f"{mean[f'{x}, others']:.3f} / {mean[f'{x}, tenth']:.3f}" for x in ("readers", "candidates")]
                print(f"| {name} | {which} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
