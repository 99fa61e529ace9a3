"""How small are the raw ids, if the model itself predicts them? Beside ids coded by popularity, of trained backbones.

    python examples/predicted.py [fitted_small] [--users 512] [--seed 0]       after `malloc-bench run fitted_small`

Bits an event, log2(1 / p), means over the events of users: p by popularity (that in training events, one more for every
item: what `ids_coded` comes to but for 5 bytes a user), and by the model's softmax over the catalogue, given all events
before; `trained` are events of the history, on which the model has trained, `target` is the one held out. KB: ids of a
history by either, and as int32. It is a bound and no method: who decodes must run the model event by event, and come to
the very numbers of who wrote, which no two machines, nor batches of two sizes, give in floating point.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor
from why import backbones

from malloc_bench.backbones import Backbone
from malloc_bench.data.tasks.batches import window
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import ends

CHUNK = 32  # users at a time: scores of each event over the catalogue
COLUMNS = ("events", "popularity", "trained", "target", "popularity, target")


def popularity(split: Split) -> Tensor:
    """Bits of every item, [n_items] float64, by its share of training events."""
    data = split.dataset
    trains = np.arange(data.n_events) < np.repeat(ends(split), np.diff(data.offsets))
    counts = torch.from_numpy(np.bincount(data.items[trains] - 1, minlength=data.n_items)).double() + 1
    return (counts.sum() / counts).log2()


def bits(backbone: Backbone, split: Split, rows: np.ndarray) -> Tensor:
    """`COLUMNS` of each user, [B, columns] float64: means over a user's events; the first has popularity's bits."""
    users, at = split.test.users[rows], split.test.at[rows]
    history = window(split.dataset, users, at, backbone.max_length)
    target, common = torch.from_numpy(split.dataset.items[at].astype(np.int64) - 1), popularity(split)
    real, ids = history.mask(), (history.items.long() - 1).clamp(min=0)
    logits = backbone(history) @ backbone.catalogue().mT * backbone.logit_scale
    chance = logits.log_softmax(-1)
    last = (history.count.long() - 1).view(-1, 1, 1).expand(-1, 1, chance.shape[2])
    wanted = chance.gather(1, last)[:, 0].gather(1, target[:, None])[:, 0]
    following = chance[:, :-1].gather(2, ids[:, 1:, None])[..., 0].double() / -np.log(2)
    own = torch.cat([common[ids[:, :1]], following], 1)
    count = history.count.double()
    by = [torch.where(real, x, 0.0).sum(1) / count for x in (common[ids], own)]
    return torch.stack([count, *by, wanted.double() / -np.log(2), common[target]], 1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="fitted_small")
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| backbone | trained: popularity | model | target: popularity | model | KB: int32 | popularity | model |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, backbone, split in backbones(asked.suite, asked.seed):
        chosen = np.random.default_rng(0).permutation(len(split.test))[: asked.users]
        parts = np.array_split(chosen, -(-len(chosen) // CHUNK))
        found = torch.cat([bits(backbone.eval(), split, rows) for rows in parts])
        count, common, own, target, common_target = found.T
        sizes = [float((count * x).mean()) / 8e3 for x in (torch.full_like(count, 32), common, own)]
        each = [float((count * x).sum() / count.sum()) for x in (common, own)]
        said = [f"{x:.2f}" for x in (*each, common_target.mean(), target.mean())] + [f"{x:.3f}" for x in sizes]
        print(f"| {name} | {' | '.join(said)} |", flush=True)


if __name__ == "__main__":
    main()
