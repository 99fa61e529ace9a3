"""Bytes over layers, by curves of what each loses with how many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

STEPS = 8  # sizes in an octave, between those that were measured
STEEP = 3  # power of the bytes; losses of fitted slots fall by up to their square


@dataclass(frozen=True)
class Curves:
    """lost, choice [L, P]: the least that any candidate of a layer loses at most with `spent` [P] bytes, and which one
    it is; infinite where none fits."""

    lost: np.ndarray
    choice: np.ndarray
    spent: np.ndarray

    @staticmethod
    def of(lost: Tensor, spent: Tensor) -> Curves:
        """From what was measured of each layer and candidate, [L, C, G] each; between two sizes a loss falls as a power
        of the bytes, or on their chord where that is steeper than `STEEP`: every event is held there, by few users
        before by all."""
        y, x = (np.log2(each.cpu().numpy().clip(1e-30)) for each in (lost, spent))
        grid = np.unique(np.concatenate([np.arange(x.min(), x.max(), 1 / STEPS), x.ravel()]))
        found = np.full((*x.shape[:2], len(grid)), np.inf)
        for place in np.ndindex(*x.shape[:2]):
            if not (sound := np.isfinite(y[place])).any():
                continue  # it gives no numbers
            size, first = np.unique(x[place][sound], return_index=True)
            best = np.minimum.accumulate(y[place][sound][first])  # more bytes need not be spent
            steep = np.append(np.diff(best) < -STEEP * np.diff(size), False)
            power = np.exp2(np.interp(grid, size, best))
            chord = np.interp(np.exp2(grid), np.exp2(size), np.exp2(best))
            among = np.searchsorted(size, grid, side="right") - 1
            found[place] = np.where(grid >= size[0], np.where(steep[among], chord, power), np.inf)
        return Curves(found.min(1), found.argmin(1), np.exp2(grid))

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
