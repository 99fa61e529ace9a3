"""JSON lines: what polars reads at once and what is read line by line, for the sake of another line, is the same."""

import numpy as np
import pytest

from malloc_bench.data.formats.objects import _one_by_one, _read

LINES = [
    '{"u": "a", "u": "b", "i": 1}', '{"i": 3, "u": null, "u": "x"}', '{"u": "a", "u": null, "i": 1}',
    '{"u": -0, "i": -0.0}', '{"u": 0, "i": 0.0}', '{"u": "-0", "i": "-0.0"}', '{"u": 1e3, "i": 2.50}',
    '{"u": 1e22, "i": 1e23}', '{"u": 1e-7, "i": -1.5e-9}', '{"u": 12345678901234567890, "i": -5}',
    '{"u": true, "i": false}', '{"i": 1}', '{"u": "\\u00e9", "i": ""}', '{"u": 0.1, "i": 123456789.123}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read_alike_whatever_else_is_in_its_block(line):
    names = ["u", "i"]
    fast = _read(f"{line}\n".encode(), names, 1)
    slow = _one_by_one(f'{line}\n{{"u": NaN}}\n'.encode(), "f", 1, names)
    assert fast is not None and not slow.broken.any()
    assert {name: slow.columns[name][0] for name in names} == {name: fast[name][0] for name in names}


def test_floats_are_written_alike():
    rng = np.random.default_rng(0)
    values = [*rng.normal(size=50), *10.0 ** rng.integers(-12, 25, 50), *rng.integers(0, 2**62, 50).astype(float)]
    text = "".join(f'{{"u": {value!r}}}\n' for value in map(float, values)).encode()
    assert _read(text, ["u"], 150)["u"].to_list() == _one_by_one(text, "f", 1, ["u"]).columns["u"].to_list()
