"""Would users do better with plans of their own than with one for all? Of trained backbones.

    python examples/choices.py [fitted_small] [--users 943]        after `malloc-bench run fitted_small`

Plans take equal bytes, for a budget caps each user: `bits` (of keys / values), fewer slots in more or more in fewer;
`layers`, how much of the bytes the lower layer has. All are `fit_omp` + `mxint`, 128 probes of the user's top.
Overlap@10 with the full state's list, means over users: of the best single plan, and what is gained on it where each
user gets one by length of history or by rank of A (the exponential of the entropy of its squared singular values, mean
over heads and layers): the best plan of each third, learnt on a half of the users and judged on the other, 100 times;
by what 32 probes held out lose, for which all plans must be made; and by the outcome itself, which nobody knows: a
bound, luck included.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from later import kept
from torch import Tensor
from why import backbones

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.compressors.fitted.auto import Auto
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import facts
from malloc_bench.evaluation.evaluate import asked_of
from malloc_bench.state import Ask, Fitted, Prefill, Stats

BUDGETS = {"1/32": 1 / 32, "1/64": 1 / 64, "1/128": 1 / 128}
FIT, TESTS, THIRDS, TIMES = {"probes": 128, "which": "top"}, 32, 3, 100
PROBES = Ask(128 + TESTS, "top")


@dataclass(frozen=True)
class Given(Auto):
    """`auto` with a plan that is given: the lowest layer's share of the bytes, the others' alike."""

    share: float = 0.5

    def planned(self, fitted: Fitted, budget: Any) -> tuple[tuple[Compressor, float], ...]:
        return tuple((self.candidates[0], share) for share in (self.share, 1 - self.share))


def written(keys: int, values: int) -> list[dict[str, Any]]:
    return [{"fit_omp": FIT}, {"mxint": {"bits": keys, "value_bits": values}}]


def plans() -> dict[str, dict[str, Compressor]]:
    bits = {
        f"{k} / {v} bits": get_compressor("compose", steps=written(k, v)) for k, v in ((4, 4), (3, 4), (2, 4), (2, 3))
    }
    layers = {f"{share:.0%} below": Given(candidates=(written(3, 4),), share=share) for share in (0.5, 0.7, 0.8, 0.9)}
    return {"bits": bits, "layers": layers}


def rank(prefill: Prefill) -> Tensor:
    """Of the weights of probes, mean over heads and layers, [B]."""
    found = []
    for layer in prefill.layers:
        weights = prefill.probes(layer, PROBES).columns(prefill.segment(layer))
        part = torch.linalg.svdvals(weights).square()
        part = part / part.sum(-1, keepdim=True).clamp(min=1e-20)
        found.append(torch.special.entr(part).sum(-1).exp().mean(1))
    return torch.stack(found).mean(0)


def judged(
    backbone: Backbone, split: Split, methods: Mapping[str, Compressor], users: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """length and rank [U] of each user; overlaps and squared gaps of probes held out [budgets, methods, U]."""
    needs, rows = Stats(probes=PROBES), []
    for method in methods.values():
        needs |= method.needs
    items, chosen = facts(split, needs), np.random.default_rng(0).permutation(len(split.test))[:users]
    for some in np.array_split(chosen, -(-len(chosen) // 64)):
        asked = asked_of(backbone, split, some, False)
        ids = torch.from_numpy(split.dataset.user_ids[split.test.users[some]])
        prefill = backbone.prepare(asked.history, ids, needs, 0, items, asked.tokens)
        full, tests = backbone.read(asked.tokens, prefill.state), prefill.probes(0, PROBES).last(TESTS)
        want, found = tests.outputs(prefill.state), []
        for budget in BUDGETS.values():
            for method in methods.values():
                state = method.compress(prefill, Budget(budget), Fitted({}))
                got, out = backbone.read(asked.tokens, state), tests.outputs(state)
                assert out is not None and want is not None, "there is a stack"
                scores = (x @ backbone.catalogue().mT for x in (got, full))
                found.append(torch.stack([kept(*scores), (out - want).square().flatten(1).mean(1)]))
        each = torch.stack(found, 1).unflatten(1, (len(BUDGETS), len(methods)))  # [2, budgets, methods, B]
        rows.append((prefill.state.length.float(), rank(prefill), each))
    length, ranks, both = (torch.cat(x, -1) for x in zip(*rows))
    return {"length": length, "rank": ranks}, *both.unbind()


def by_thirds(what: Tensor, overlap: Tensor) -> float:
    """What the best plan of each third of `what` [U] gains on the best one of all, learnt on others; overlap [P, U]."""
    gained, dice = [], torch.Generator().manual_seed(0)
    place = what.argsort(stable=True).argsort() * THIRDS // len(what)
    for _ in range(TIMES):
        learn, judge = torch.randperm(len(what), generator=dice).chunk(2)
        best = torch.stack([overlap[:, learn[place[learn] == third]].mean(1).argmax() for third in range(THIRDS)])
        one = overlap[overlap[:, learn].mean(1).argmax(), judge]
        gained.append(float((overlap[best[place[judge]], judge] - one).mean()))
    return sum(gained) / TIMES


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="fitted_small")
    parser.add_argument("--users", type=int, default=943)
    parser.add_argument("--backbones", nargs="+", default=["sasrec", "hstu"])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(
        "| backbone | plans | bytes | best for all | kept | by length | by rank | by probes held out | by the outcome |"
    )
    print("|---|---|---|---|--:|--:|--:|--:|--:|")
    for name, backbone, split in backbones(asked.suite, asked.seed):
        if name not in asked.backbones:
            continue
        for kind, methods in plans().items():
            known, overlaps, gaps = judged(backbone, split, methods, asked.users)
            for budget, overlap, gap in zip(BUDGETS, overlaps, gaps):
                best = int(overlap.mean(1).argmax())
                mean = float(overlap[best].mean())
                tried = float(overlap.gather(0, gap.argmin(0)[None]).mean()) - mean
                gained = [*(by_thirds(x, overlap) for x in known.values()), tried, float(overlap.amax(0).mean()) - mean]
                cells = " | ".join(f"{x:+.3f}" for x in gained)
                print(f"| {name} | {kind} | {budget} | {list(methods)[best]} | {mean:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
