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
    it is; infinite where none fits. measured [L, P]: whether that one was measured with so many."""

    lost: np.ndarray
    choice: np.ndarray
    spent: np.ndarray
    measured: np.ndarray

    @staticmethod
    def of(lost: Tensor, spent: Tensor) -> Curves:
        """From what was measured of each layer and candidate, [L, C, G] each; between two sizes a loss falls as a power
        of the bytes, or on their chord where that is steeper than `STEEP`: every event is held there, by few users
        before by all."""
        y, x = (np.log2(each.cpu().numpy().clip(1e-30)) for each in (lost, spent))
        grid = np.unique(np.concatenate([np.arange(x.min(), x.max(), 1 / STEPS), x.ravel()]))
        found = np.full((*x.shape[:2], len(grid)), np.inf)
        measured = np.zeros(found.shape, bool)
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
            measured[place] = np.isin(grid, size)
        choice = found.argmin(1)
        of_it = np.take_along_axis(measured, choice[:, None], 1)[:, 0]
        return Curves(found.min(1), choice, np.exp2(grid), of_it)

    def divided(self, budget: float) -> list[tuple[int, float]]:
        """Each layer's candidate and its share of all bytes, of which there are `budget`.

        Each begins with the least it can. Of the lower convex hulls the steps that save most for what they cost are
        taken first, while there are bytes; then, of sizes that were measured, those that still fit, which save less for
        their cost. What is left goes to all in proportion.
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
        while True:
            costs = self.spent - self.spent[at][:, None]
            saved = np.take_along_axis(self.lost, np.array(at)[:, None], 1) - self.lost
            fits = self.measured & (costs > 0) & (costs <= left) & (saved > 0)
            if not fits.any():
                break
            worth = np.divide(saved, costs, out=np.zeros_like(saved), where=fits)
            layer, there = np.unravel_index(worth.argmax(), worth.shape)
            at[layer], left = int(there), left - float(costs[layer, there])
        total = sum(float(self.spent[here]) for here in at)
        return [(int(self.choice[layer, here]), float(self.spent[here]) / total) for layer, here in enumerate(at)]
