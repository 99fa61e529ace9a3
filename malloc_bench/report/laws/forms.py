"""Forms that a law may have, and how each is fitted: Huber's loss of log residuals, from many starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

Array = NDArray[np.float64]
HUBER = 1e-3  # log residuals above it count by their size, not its square (Hoffmann et al., arXiv 2203.15556)
LEAST = 1e-9  # of what is predicted: it has a logarithm
_EXPONENTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_MOST = 5.0  # an exponent


@dataclass(frozen=True)
class Form:
    """y of x [n, d]: `predict(theta, x)` -> [n], and how it moves with theta: `slopes(theta, x)` -> [n, p]; `names` of
    theta, of which `bounds` [2, p]; `starts` begin a fit."""

    name: str
    formula: str
    names: tuple[str, ...]
    predict: Callable[[Array, Array], Array]
    slopes: Callable[[Array, Array], Array]
    starts: Callable[[Array, Array], Iterator[Array]]
    bounds: tuple[tuple[float, ...], tuple[float, ...]]

    def fit(self, x: Array, y: Array, near: Array | None = None) -> Array:
        """Theta of the least loss; near: begin there alone. y must be above 0."""

        def off(theta: Array) -> Array:
            return np.log(np.maximum(self.predict(theta, x), LEAST)) - logs

        def slopes(theta: Array) -> Array:
            return self.slopes(theta, x) / np.maximum(self.predict(theta, x), LEAST)[:, None]

        logs = np.log(y)
        low, high = (np.array(side) for side in self.bounds)
        best, least = None, np.inf
        for start in [near] if near is not None else self.starts(x, y):
            found = least_squares(off, np.clip(start, low, high), slopes, (low, high), loss="huber", f_scale=HUBER)
            if found.cost < least:
                best, least = found.x, float(found.cost)
        assert best is not None, "a form has a start"
        return best


def _power(theta: Array, x: Array) -> Array:
    return theta[0] + np.exp(np.minimum(theta[2] * (theta[1] - np.log(x[:, 0])), 50.0))


def _power_slopes(theta: Array, x: Array) -> Array:
    far = theta[1] - np.log(x[:, 0])
    above = np.exp(np.minimum(theta[2] * far, 50.0))
    return np.stack([np.ones(len(x)), theta[2] * above, far * above], 1)


def _power_starts(x: Array, y: Array) -> Iterator[Array]:
    for a in _EXPONENTS:
        floor, rise = _scaled(x[:, 0] ** -a, y)
        yield np.array([floor, np.log(max(rise, 1e-12)) / a, a])


def _pure(theta: Array, x: Array) -> Array:
    return _power(np.array([0.0, *theta]), x)


def _pure_slopes(theta: Array, x: Array) -> Array:
    return _power_slopes(np.array([0.0, *theta]), x)[:, 1:]


def _pure_starts(x: Array, y: Array) -> Iterator[Array]:
    slope, ends = np.polyfit(np.log(x[:, 0]), np.log(y), 1)
    a = max(-slope, 1e-3)
    yield np.array([ends / a, a])


def _joint(theta: Array, x: Array) -> Array:
    return _power(theta[:3], x) + _pure(theta[3:], x[:, 1:])


def _joint_slopes(theta: Array, x: Array) -> Array:
    return np.hstack([_power_slopes(theta[:3], x), _pure_slopes(theta[3:], x[:, 1:])])


def _joint_starts(x: Array, y: Array) -> Iterator[Array]:
    for a in _EXPONENTS:
        for b in _EXPONENTS:
            floor, one, other = _scaled(np.stack([x[:, 0] ** -a, x[:, 1] ** -b], 1), y)
            logs = (np.log(max(each, 1e-12)) / c for each, c in ((one, a), (other, b)))
            n, d = logs
            yield np.array([floor, n, a, d, b])


def _line(theta: Array, x: Array) -> Array:
    return theta[0] - np.log(x) @ theta[1:]


def _line_slopes(theta: Array | None, x: Array) -> Array:
    return np.column_stack([np.ones(len(x)), -np.log(x)])


def _line_starts(x: Array, y: Array) -> Iterator[Array]:
    yield np.linalg.lstsq(_line_slopes(None, x), y, rcond=None)[0].astype(np.float64)


def _saturating(theta: Array, x: Array) -> Array:
    return theta[0] + theta[1] / (1 + x[:, 0] / np.exp(theta[2]))


def _saturating_slopes(theta: Array, x: Array) -> Array:
    share = 1 / (1 + x[:, 0] / np.exp(theta[2]))
    return np.stack([np.ones(len(x)), share, theta[1] * share * (1 - share)], 1)


def _saturating_starts(x: Array, y: Array) -> Iterator[Array]:
    for half in np.geomspace(x.min() / 10, x.max() * 10, 7):
        yield np.array([*_scaled(1 / (1 + x[:, 0] / half), y), np.log(half)])


def _scaled(columns: Array, y: Array) -> Array:
    """y as a floor and shares of columns [n] or [n, c], none below 0, by least relative squares."""
    a = np.column_stack([np.ones(len(y)), columns]) / y[:, None]
    size = np.linalg.norm(a, axis=0).clip(1e-30)
    return nnls(a / size, np.ones(len(y)))[0] / size


POWER = Form(
    "power", "E + (x0 / x)^a", ("E", "log x0", "a"), _power, _power_slopes, _power_starts,
    ((0.0, -np.inf, 1e-3), (np.inf, np.inf, _MOST)),
)  # fmt: skip
PURE = Form(
    "power without a floor", "(x0 / x)^a", ("log x0", "a"), _pure, _pure_slopes, _pure_starts,
    ((-np.inf, 1e-3), (np.inf, _MOST)),
)  # fmt: skip
LINE = Form("log", "c - b ln x", ("c", "b"), _line, _line_slopes, _line_starts, ((-np.inf,) * 2, (np.inf,) * 2))
SATURATING = Form(
    "saturating", "E + S / (1 + x / x0)", ("E", "S", "log x0"), _saturating, _saturating_slopes, _saturating_starts,
    ((0.0, 0.0, -np.inf), (np.inf,) * 3),
)  # fmt: skip
JOINT = Form(
    "joint power", "E + (x0 / x)^a + (z0 / z)^b", ("E", "log x0", "a", "log z0", "b"),
    _joint, _joint_slopes, _joint_starts,
    ((0.0, -np.inf, 1e-3, -np.inf, 1e-3), (np.inf, np.inf, _MOST, np.inf, _MOST)),
)  # fmt: skip
PLANE = Form(
    "log", "c - b ln x - d ln z", ("c", "b", "d"), _line, _line_slopes, _line_starts, ((-np.inf,) * 3, (np.inf,) * 3)
)  # fmt: skip
