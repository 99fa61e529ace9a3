"""Layers that share directions, by their definition in float64."""

import math

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

COUNTS = (0, 1, 3, 9, 14)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefill(layers=2):
    keys, values = ([noise(5, 2, 14, 4, seed=7 * i + j) for i in range(layers)] for j in range(2))
    return Prefill.from_tensors(keys, values, lengths=torch.tensor(COUNTS), positions=True)


def arc(a, b, t):
    cosine = float(a @ b) / float(a.norm() * b.norm())
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return (math.sin((1 - t) * angle) * a / a.norm() + math.sin(t * angle) * b / b.norm()) / math.sin(angle)


@pytest.mark.parametrize(("t", "retain"), [(0.6, 0.0), (0.5, 0.25), (0.0, 0.1)])
def test_minicache(t, retain):
    full = prefill()
    state = get_compressor("minicache", t=t, retain=retain).compress(full)
    for user, n in enumerate(COUNTS):
        both = {
            name: [full.segment(i).fields[name].dense()[user].double() for i in range(2)] for name in ("keys", "values")
        }
        alike = [
            sum(float(a[h, i] @ b[h, i] / a[h, i].norm() / b[h, i].norm()) for a, b in both.values() for h in range(2))
            for i in range(n)
        ]
        whole = sorted(sorted(range(n), key=lambda i: alike[i])[: int(retain * n)])
        rest = [i for i in range(n) if i not in whole]
        for layer in range(2):
            body, kept = state.layers[layer]
            assert body.slots.positions[user, 0, : len(rest)].tolist() == rest
            assert kept.slots.positions[user, 0, : len(whole)].tolist() == whole
            for name, pair in both.items():
                for at, i in enumerate(rest):
                    for h in range(2):
                        want = pair[layer][h, i].norm() * arc(pair[0][h, i], pair[1][h, i], t)
                        close(body.fields[name].dense()[user, h, at].double(), want, name, 1e-5)
                close(kept.fields[name].dense()[user, :, : len(whole)].double(), pair[layer][:, whole], name, 1e-6)


def test_bytes():
    """One direction of two heads and fields for two layers, and a norm for each; a third layer stays."""
    direction, norms, whole = 2 * 2 * 4 * 4, 2 * 2 * 2 * 4, 2 * 2 * 4 * 4
    state = get_compressor("minicache", retain=0.0).compress(prefill())
    assert state.nbytes().tolist() == [
        4 + 2 * 4 + n * (direction + norms) for n in COUNTS
    ]  # and an empty segment's count
    state = get_compressor("minicache", retain=0.0).compress(prefill(3))
    assert state.nbytes().tolist() == [4 + 3 * 4 + n * (direction + norms + whole) for n in COUNTS]


def test_one_layer_has_nothing_to_merge():
    why = get_compressor("minicache").supports(get_backbone("sasrec", 9, layers=1))
    assert why == "minicache merges two layers, from 0; there are 1"


def test_layers_of_two_shapes_are_named():
    x = [noise(1, 2, 9, 8), noise(1, 4, 9, 6)]
    with pytest.raises(ValueError, match=r"minicache merges layers of one shape; 0 and 1 have .*8.*6"):
        get_compressor("minicache").compress(Prefill.from_tensors(x, x))
