"""How families look in figures and pages, and sizes in words."""

from __future__ import annotations

COLOURS = {
    "windowing": "#0072B2",
    "eviction": "#D55E00",
    "merging": "#009E73",
    "quantization": "#CC79A7",
    "low-rank": "#E69F00",
    "recompute": "#7B4FA3",
    "heads": "#56B4E9",
    "recurrent": "#8C564B",
    "search": "#BCBD22",
    "fitted": "#C2185B",
}
OTHER = "#555555"  # a family that is not in the taxonomy
FLOOR = "#999999"
#: families are told apart without colour too
DASHES = {
    "chain": "-",
    "fitted": (0, (5, 1)),
    "merging": (0, (3, 1, 1, 1)),
    "low-rank": (0, (1, 1)),
    "quantization": (0, (4, 2)),
    "eviction": (0, (2, 1)),
    "windowing": (0, (1, 2)),
    "heads": (0, (6, 2, 1, 2)),
    "recurrent": (0, (8, 2)),
    "search": (0, (3, 2, 1, 2, 1, 2)),
}
MARKS = {
    "chain": "o",
    "fitted": "D",
    "merging": "P",
    "low-rank": "s",
    "quantization": "^",
    "eviction": "v",
    "windowing": "X",
    "recompute": "<",
    "heads": "p",
    "recurrent": "h",
    "search": ">",
}
#: what the bytes of a state hold, in the order in which they are stacked
PARTS = {
    "keys": "#0072B2",
    "values": "#D55E00",
    "shared": "#009E73",
    "hidden": "#8C564B",
    "memory": "#56B4E9",
    "positions": "#E69F00",
    "times": "#CC79A7",
    "masses": "#C9B400",
    "scores": "#7F7F3F",
    "look-up": "#BCBD22",
    "ids": "#7B4FA3",
    "kinds": "#C2185B",
    "counts": "#777777",
    "length": "#BBBBBB",
}
STEPS_OF_1000 = ((1e9, "GB", "G"), (1e6, "MB", "M"), (1e3, "KB", "k"), (1.0, "B", ""))


def human(value: float, unit: int | None) -> str:
    """`12 KB` (unit 1), `12 k` (unit 2), `0.03` (None)."""
    if unit is None:
        return f"{value:g}"
    step = next((step for step in STEPS_OF_1000 if value >= step[0]), STEPS_OF_1000[-1])
    return f"{value / step[0]:g} {step[unit]}".strip()
