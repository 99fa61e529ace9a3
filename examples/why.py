"""Why few fitted slots do: how much of what a layer reads depends on who reads it. Backbones of a suite, once trained.

    python examples/why.py [fitted_small] [--users 256] [--seed 0]       after `malloc-bench run fitted_small`

Of each layer, means over users and heads, in percent but for the ranks. Probes are 128 items drawn by training events;
the last 26 are held out, and say how much of the squared length of what the history gives is explained there: by
`fit_constant`, one vector; by a map linear in the query, of rank 1 and 4, beside it; by 4 and 8 slots of `fit_omp`.
rank of A: exp of the entropy of the squared singular values of the weights [probes, slots], their common row taken off.
own: the weight that falls to the token itself (softmax). by length: the user's events, in thirds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors.fitted.fit_omp import FitOMP
from malloc_bench.compressors.fitted.solving import rows_of
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import facts, histories, sampled
from malloc_bench.state import Prefill, Stats
from malloc_bench.suite import load_suite
from malloc_bench.suite.plan import checkpoint_folder
from malloc_bench.training.checkpoints import load_weights

PROBES, KNOWN, RANKS, SLOTS = 128, 102, (1, 4), (4, 8)
NEEDS, METHOD = Stats(probes=PROBES), FitOMP(probes=KNOWN)
COLUMNS = ("rank of A", "own", "constant", *(f"rank {r}" for r in RANKS), *(f"{k} slots" for k in SLOTS))


def explained(target: Tensor, guess: Tensor, held: Tensor) -> Tensor:
    """Of the squared length of target [B, H, R, D] on rows held out, [B]."""
    left, whole = (((x * held) ** 2).sum((1, 2, 3)) for x in (target - guess, target))
    return 1 - left / whole.clamp(min=1e-30)


def linear(q: Tensor, rest: Tensor, known: Tensor, rank: int) -> Tensor:
    """The best guess of rest [B, H, R, D'] that is linear in q [B, H, R, D], of so low a rank, from rows known."""
    x, y = q * known, rest * known
    gram = x.mT @ x
    ridge = 1e-2 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-20
    slope = torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1]), x.mT @ y)
    basis = torch.linalg.eigh((x @ slope).mT @ (x @ slope))[1][..., -rank:]
    return q @ slope @ basis @ basis.mT


def layer(prefill: Prefill, number: int) -> Tensor:
    """`COLUMNS` of a layer, [B, columns]."""
    probes, segment = prefill.probes(number, *NEEDS.asks), prefill.segment(number)
    heads = next(iter(segment.fields.values())).shape[1]
    target, q, share = (rows_of(x.float(), heads) for x in (probes.target, probes.asking(), probes.share))
    known = (torch.arange(target.shape[2]) % PROBES < KNOWN)[:, None].float()
    held = 1 - known
    weights = rows_of(probes.columns(segment).float(), heads)
    values = torch.linalg.svdvals(weights - weights.mean(2, keepdim=True)).square()
    spread = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    rank = (-(spread * spread.clamp(min=1e-30).log()).sum(-1)).exp().mean(1)
    mean = (target * known).sum(2, keepdim=True) / known.sum()
    centred = q - (q * known).sum(2, keepdim=True) / known.sum()
    found = [rank, share.mean((1, 2, 3)), explained(target, mean.expand_as(target), held)]
    found += [explained(target, mean + linear(centred, target - mean, known, r), held) for r in RANKS]
    for k in SLOTS:
        (slots,) = METHOD.compress(prefill, {"slots": k}).layers[number]
        own = rows_of(probes.own_values().float().expand(-1, probes.target.shape[1], -1, -1), heads)
        weighed, alone = (rows_of(x.float(), heads) for x in probes.weigh(slots))
        got = weighed @ slots.fields["values"].dense().float() + (alone - share) * own
        found.append(explained(target, got, held))
    return torch.stack(found, 1)


def backbones(suite: str, seed: int) -> Iterator[tuple[str, Backbone, Split]]:
    """Name, trained weights and split of every backbone of a suite on its first data set."""
    seen = set()
    for cell in load_suite(suite).cells():
        if cell.compressor.name != "full" or cell.seed != seed or cell.backbone.name in seen:
            continue
        seen.add(cell.backbone.name)
        data = get_dataset(cell.dataset)
        cell = cell.settled(data)
        assert cell.split is not None, "settled"
        split = cell.task.cut(data, cell.split)
        assert isinstance(split, Split), "of retrieval"
        backbone = get_backbone(cell.backbone.name, data.n_items, data.has_time, **cell.backbone.params)
        if load_weights(backbone, checkpoint_folder(cell)) is None:
            raise SystemExit(f"{cell.backbone.name} is not trained yet: malloc-bench run {suite} --only seed={seed}")
        yield cell.backbone.name, backbone.eval(), split


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="fitted_small")
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| backbone | layer | " + " | ".join(COLUMNS) + " | 8 slots, by length |")
    print("|---|--:|" + "--:|" * (len(COLUMNS) + 1))
    for name, backbone, split in backbones(asked.suite, asked.seed):
        items, rows, lengths = facts(split, NEEDS), [], []
        for ids, history in histories(split, sampled(split, asked.users), backbone.max_length):
            prefill = backbone.prepare(history, ids, NEEDS, asked.seed, items)
            rows.append(torch.stack([layer(prefill, number) for number in prefill.layers], 1))  # [B, L, columns]
            lengths.append(history.count)
        table, length = torch.cat(rows), torch.cat(lengths).numpy()
        thirds = [length < part for part in np.quantile(length, [1 / 3, 2 / 3])]
        groups = (thirds[0], thirds[1] & ~thirds[0], ~thirds[1])
        for number, one in enumerate(table.unbind(1)):
            mean = one.mean(0).tolist()
            cells = [f"{mean[0]:.1f}", *(f"{100 * x:.1f}" for x in mean[1:])]
            by_length = " / ".join(f"{100 * float(one[torch.from_numpy(some), -1].mean()):.1f}" for some in groups)
            print(f"| {name} | {number + 1} | " + " | ".join(cells) + f" | {by_length} |", flush=True)


if __name__ == "__main__":
    main()
