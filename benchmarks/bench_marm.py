"""What stale entries cost MARM on real data: MovieLens-100K as a stream in time order. `make bench`, or by itself:

    python benchmarks/bench_marm.py [epochs [none|dot|group|cached ...]]

A model trains through the log, STEP events of all users at a time, epoch after epoch, and writes each event's entries
with the parameters of that step; memories differ in how often they write an event again. Then all test users (leave
one out, seen items filtered) are asked with each memory as it is, and what it does not hold is built on request. Age:
training steps since an entry was written. Error and overlap@10: of what is read, to entries of today's parameters.
`cached`: no search, and the model trains on its entries as well, without a gradient through them, as the paper's does.
About two minutes of one core for each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.marm_cache import MemoryCache
from malloc_bench.backbones.marm_stream import read_gap, slices, stream
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.batches import split_newest, window
from malloc_bench.data.tasks.splits import Split, get_split
from malloc_bench.evaluation.ranking import question, rank
from malloc_bench.measure import load, threads
from malloc_bench.state import Events, UserState

SIZE = {"layers": 2, "heads": 2, "dim": 64, "max_length": 100, "top_k": 32}
STEP, RATE, EPOCHS = 512, 2e-3, 8
REFRESH = {"every epoch": 1, "every 2nd epoch": 2, "every 4th epoch": 4, "never again": 0}


def without(memory: MemoryCache, lost: Tensor) -> MemoryCache:
    """A copy that does not hold the entries lost, [U, S] bool."""
    copy = deepcopy(memory)
    copy.items[:, : lost.shape[1]][lost] = 0
    return copy


def damaged(memory: MemoryCache, log: Events) -> dict[str, MemoryCache]:
    """What becomes of a memory when entries are lost, or late."""
    assert log.times is not None
    lost = torch.rand(log.items.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    late = log.times > log.times[log.mask()].double().quantile(0.9)
    return {
        "half of the entries lost": without(memory, lost),
        "the log's last tenth not written": without(memory, late),
    }


def measure(split: Split, search: str, epochs: int) -> list[list[str]]:
    """Lines of the table, in cells."""
    torch.manual_seed(0)
    data, test = split.dataset, split.test
    how = {"cached": True} if search == "cached" else {"search": search}
    backbone = get_backbone("marm", data.n_items, data.has_time, **how, **SIZE)
    events = window(data, test.users, test.at, SIZE["max_length"])
    history, tokens = split_newest(events)
    asked, users = question(data, test.users, test.at), torch.arange(len(test))
    log = window(data, test.users, split.train_end[test.users], history.items.shape[1])

    def quality(state: UserState) -> list[str]:
        (ranks,) = rank(backbone.read(tokens, state).transpose(0, 1), backbone.catalogue(), asked)
        found = (ranks < 10).float()
        return [f"{found.mean():.4f}", f"{(found / (ranks + 2.0).log2()).mean():.4f}"]

    written = {name: MemoryCache(len(test), backbone.config, refresh) for name, refresh in REFRESH.items()}
    optimizer = torch.optim.AdamW(backbone.parameters(), RATE, betas=(0.9, 0.98))
    began = time.process_time()
    stream(backbone, log, optimizer, list(written.values()), epochs=epochs, chunk=STEP)
    steps, hits = len(slices(log, STEP)), next(iter(written.values())).hit_rate
    print(
        f"{search}: {epochs} epochs of {steps} steps in {time.process_time() - began:.0f} s of CPU time; ",
        end="",
    )
    print(f"{hits:.1%} of the events looked up in the stream had an entry")
    backbone.eval()
    with torch.inference_mode():
        nothing = Events(history.items[:, :0], 0 * history.count)
        built = {"no history": nothing, "no memory: built on request": history}
        lines = [[search, name, *4 * [""], *quality(backbone.prefill(x).state)] for name, x in built.items()]
        today = MemoryCache(len(test), backbone.config)
        backbone.recall(today, users, history)
        renewed = {f"written {name}": memory for name, memory in written.items()}
        for name, memory in {"today's parameters": today, **renewed, **damaged(written["every epoch"], log)}.items():
            gap = read_gap(backbone, memory, users, history, tokens)
            figures = [f"{gap.hit_rate:.1%}", f"{gap.age:,.0f}", f"{gap.error:.3f}", f"{gap.overlap:.3f}"]
            lines.append([search, name, *figures, *quality(backbone.recall(memory, users, history))])
    return lines


def report(epochs: int = EPOCHS, searches: Sequence[str] = ("none", "cached"), data: str = "ml-100k") -> None:
    split, before = get_split("leave_one_out", get_dataset(data)), load()
    print()
    with threads(1):
        lines = [line for search in searches for line in measure(split, search, epochs)]
    size = ", ".join(f"{key} {value}" for key, value in SIZE.items())
    print(f"{data}, {len(split.test)} test users; {size}; load {before:.1f} before and {load():.1f} after\n")
    head = ["search or cached", "entries", "hit rate", "age, steps", "error", "overlap@10", "HR@10", "NDCG@10"]
    for cells in (head, ["---", "---", *6 * ["--:"]], *lines):
        print(f"| {' | '.join(cells)} |")


def test_marm(benchmark) -> None:
    benchmark.pedantic(report, rounds=1)


if __name__ == "__main__":
    report(int(sys.argv[1]) if len(sys.argv) > 1 else EPOCHS, sys.argv[2:] or ["none", "cached"])
