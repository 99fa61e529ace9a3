"""A law judged by what it predicts of points that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from malloc_bench.report.laws.forms import JOINT, LEAST, LINE, PLANE, POWER, PURE, SATURATING, Array, Form

MANY = 7  # sizes, of which two can be done without
NEEDED = 0.9  # of the bootstraps a law must beat both plain guesses


@dataclass
class Judged:
    """A form over all points, and over those that are not held out.

    theta, intervals [p, 2] (95 %, percentiles of bootstraps): of all points. error: mean |log(predicted / seen)| of the
    points held out, by the form fitted to the others; same, line: of the plain guesses, that y stays as at the largest
    x that was fitted, and a line in log x. won: share of the bootstraps in which error is below both.
    """

    form: Form
    theta: Array
    error: float
    same: float
    line: float
    won: float = float("nan")
    intervals: Array = field(default_factory=lambda: np.empty((0, 2)))

    @property
    def holds(self) -> bool:
        """Whether it is more than a line in log x, and predicts."""
        return self.form not in (LINE, PLANE) and self.won >= NEEDED


@dataclass(frozen=True)
class Points:
    """x [n, d] > 0, y [n] > 0, and which of them are held out, [n] bool: those of the largest x of the first column.
    Points of the same x are trainings from several seeds."""

    x: Array
    y: Array
    held: NDArray[np.bool_]

    @staticmethod
    def of(x: Array, y: Array, hold: int | None = None) -> Points:
        """hold: of how many of the largest x of the first column no point is fitted; two where there are MANY, else
        the largest."""
        sizes = np.unique(x[:, 0])
        hold = hold or (2 if len(sizes) >= MANY else 1)
        return Points(x, y, x[:, 0] >= sizes[-min(hold, len(sizes))])

    @property
    def forms(self) -> tuple[Form, ...]:
        return (POWER, PURE, SATURATING, LINE) if self.x.shape[1] == 1 else (JOINT, PLANE)

    @property
    def places(self) -> int:
        """How many there are to fit to."""
        return len(np.unique(self.x[~self.held], axis=0))

    def drawn(self, rng: np.random.Generator) -> Points:
        """By lot, with replacement: of those to fit as many places, and of each place as many seeds."""
        rows = []
        for part in (False, True):
            at = np.flatnonzero(self.held == part)
            places, of = np.unique(self.x[at], axis=0, return_inverse=True)
            each = np.arange(len(places)) if part else rng.integers(len(places), size=len(places))
            for place in each:
                own = at[of.ravel() == place]
                rows.append(rng.choice(own, len(own)))
        picked = np.concatenate(rows)
        return Points(self.x[picked], self.y[picked], self.held[picked])


def judged(points: Points, bootstraps: int = 200, seed: int = 0) -> list[Judged]:
    """Every form that there are points enough for, the least error first. Raises ValueError where there is none."""
    forms = [form for form in points.forms if points.places > len(form.names)]
    if not forms:
        least = min(len(form.names) for form in points.forms) + 1
        raise ValueError(f"{points.places} sizes are left to fit beside those held out; a law needs {least} or more")
    rng, plain = np.random.default_rng(seed), _plain(points)
    lots = [(lot, *_plain(lot)) for lot in (points.drawn(rng) for _ in range(bootstraps))]
    found = [_bootstrapped(form, points, plain, lots) for form in forms]
    return sorted(found, key=lambda each: each.error)


def _error(form: Form, points: Points, near: Array | None = None) -> float:
    """Of the form over the points held out, fitted to the others."""
    x, y, beyond, seen = _parted(points)
    return _off(form.predict(form.fit(x, y, near), beyond), seen)


def _plain(points: Points) -> tuple[float, float]:
    """Errors of the last y and of a line."""
    x, y, beyond, seen = _parted(points)
    plain = LINE if x.shape[1] == 1 else PLANE
    return _off(_last(x, y, beyond), seen), _off(plain.predict(plain.fit(x, y), beyond), seen)


def _parted(points: Points) -> tuple[Array, Array, Array, Array]:
    held = points.held
    return points.x[~held], points.y[~held], points.x[held], points.y[held]


def _off(guess: Array, seen: Array) -> float:
    return float(np.abs(np.log(np.maximum(guess, LEAST) / seen)).mean())


def _last(x: Array, y: Array, beyond: Array) -> Array:
    """For each place beyond the mean y of the largest x that was fitted, among those of the same other columns."""
    guess = []
    for place in beyond:
        alike = (x[:, 1:] == place[1:]).all(1)
        alike = alike if alike.any() else np.ones(len(x), bool)
        guess.append(y[alike][x[alike, 0] == x[alike, 0].max()].mean())
    return np.array(guess)


def _bootstrapped(
    form: Form, points: Points, plain: tuple[float, float], lots: Sequence[tuple[Points, float, float]]
) -> Judged:
    theta = form.fit(points.x, points.y)
    small = form.fit(points.x[~points.held], points.y[~points.held])
    found = Judged(form, theta, _error(form, points), *plain)
    thetas, wins = [], []
    for lot, same, line in lots:
        if lot.places < len(form.names):
            continue  # too few places came out
        thetas.append(form.fit(lot.x, lot.y, theta))
        error = _error(form, lot, small)
        wins.append(error < same and (error < line or form in (LINE, PLANE)))
    if wins:
        found.won = float(np.mean(wins))
        found.intervals = np.percentile(np.array(thetas), [2.5, 97.5], axis=0).T
    return found
