"""Bytes over layers, by curves of what each loses with how many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

STEPS = 8  # sizes in an octave, between those that were measured


@dataclass(frozen=True)
class Curves:
    """lost, choice [L, P]: the least that any candidate of a layer loses at most with `spent` [P] bytes, and which one
    it is; infinite where none fits."""

    lost: np.ndarray
    choice: np.ndarray
    spent: np.ndarray

    @staticmethod
    def of(lost: Tensor, spent: Tensor) -> Curves:
        """From what was measured of each layer and candidate, [L, C, G] each; between two sizes the logarithm of what
        is lost falls in line with that of the bytes."""
        y, x = (np.log(each.cpu().numpy().clip(1e-30)) for each in (lost, spent))
        grid = np.arange(x.min(), x.max() + np.log(2) / STEPS, np.log(2) / STEPS)
        found = np.full((*x.shape[:2], len(grid)), np.inf)
        for place in np.ndindex(*x.shape[:2]):
            size, first = np.unique(x[place], return_index=True)
            best = np.minimum.accumulate(y[place][first])  # more bytes need not be spent
            found[place] = np.where(grid >= size[0] - 1e-9, np.exp(np.interp(grid, size, best)), np.inf)
        return Curves(found.min(1), found.argmin(1), np.exp(grid))

    def divided(self, budget: float) -> list[tuple[int, float]]:
        """Each layer's candidate and its share of all bytes, of which there are `budget`.

        Each begins with the least it can. Of the lower convex hulls the steps that save most for what they cost are
        taken first, while there are bytes; what is then left goes to all in proportion.
        """
        steps: list[tuple[float, int, int]] = []  # what it saves for its cost, layer, where it ends
        at = [int(np.isfinite(losses).argmax()) for losses in self.lost]
        left = budget - sum(float(self.spent[here]) for here in at)
        for layer, here in enumerate(at):
            losses = self.lost[layer]
            while here + 1 < len(losses):
                slopes = (losses[here] - losses[here + 1 :]) / (self.spent[here + 1 :] - self.spent[here])
                if not slopes.max() > 0:
                    break
                here += 1 + int(slopes.argmax())
                steps.append((float(slopes.max()), layer, here))
        for _, layer, there in sorted(steps, key=lambda step: -step[0]):
            cost = float(self.spent[there] - self.spent[at[layer]])
            if cost <= left:
                at[layer], left = there, left - cost
        total = sum(float(self.spent[here]) for here in at)
        return [(int(self.choice[layer, here]), float(self.spent[here]) / total) for layer, here in enumerate(at)]
