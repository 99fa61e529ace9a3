"""Column sums in tiles are those of whole blocks, on every backbone that has them, and of a definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from malloc_bench.backbones import statistics, sums
from malloc_bench.data.tasks.batches import split_newest, window
from malloc_bench.state import Stats
from tests.conftest import BACKBONES

ASKED = Stats(column_sum=True)
OWN_PASS = ("longformer", "linformer", "reformer", "beacon")  # they hide slots, which tiles know nothing of
WITH_TILES = [
    name
    for name in BACKBONES
    if not name.startswith(("climber", "gated_delta", "rwkv", "fuxi")) and not name.endswith(OWN_PASS)
]


@pytest.mark.parametrize("cells", [1, 700, 1 << 18], ids=["a head", "some heads", "all"])
@pytest.mark.parametrize("long", [0, 1024], ids=["tall", "flat"])
def test_against_a_definition(monkeypatch, cells: int, long: int) -> None:
    monkeypatch.setattr(sums, "CELLS", cells)
    monkeypatch.setattr(sums, "LONG", long)
    rng = np.random.default_rng(0)
    b, h, s = 3, 2, 301
    q, k, v = (rng.normal(size=(b, h, s, d)) for d in (5, 5, 7))
    real = np.arange(s) < np.array([301, 40, 0])[:, None]
    given = (torch.from_numpy(x).float() for x in (q, k, v))
    mixed, received = sums.tiled(*given, torch.from_numpy(real), sums.softmax)
    future = np.triu(np.ones((s, s), bool), 1)
    weights = np.exp(np.where(future, -np.inf, q @ k.swapaxes(-1, -2)))
    weights /= weights.sum(-1, keepdims=True)
    assert np.abs(mixed.numpy() - weights @ v).max() < 1e-5
    assert np.abs(received.numpy() - (weights * real[:, None, :, None]).sum(2)).max() < 1e-4


def events_of(split, backbone, users: int):
    rows = np.arange(users)
    return split_newest(window(split.dataset, split.test.users[rows], split.test.at[rows], backbone.max_length))[0]


@pytest.mark.parametrize("name", WITH_TILES)
def test_every_backbone_comes_to_what_whole_blocks_come_to(trained, synthetic, name: str, monkeypatch) -> None:
    backbone = trained(name)
    history = events_of(synthetic, backbone, 12)
    calls = []
    plain = statistics.tiled
    monkeypatch.setattr(statistics, "tiled", lambda *given: calls.append(1) or plain(*given))
    monkeypatch.setattr(sums, "CELLS", 500)
    with torch.no_grad():
        tiles = backbone.prefill(history, stats=ASKED)
        assert len(calls) == len(backbone.blocks)
        monkeypatch.setattr(type(backbone.blocks[0]), "in_tiles", lambda *given: None)
        blocks = backbone.prefill(history, stats=ASKED)
    for layer in range(len(backbone.blocks)):
        real = tiles.slots(layer).mask(history.items.shape[1])
        a, b = (torch.where(real, each.column_sum[layer], 0) for each in (tiles, blocks))
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()
        for one, other in zip(tiles.segment(layer).fields.values(), blocks.segment(layer).fields.values()):
            assert torch.allclose(one.dense()[:, :, :1], other.dense()[:, :, :1], atol=1e-5)


def test_with_a_gradient_whole_blocks_are_used(trained, synthetic, monkeypatch) -> None:
    backbone = trained("sasrec")
    backbone.requires_grad_(True)
    try:
        monkeypatch.setattr(statistics, "tiled", None)
        prefill = backbone.prefill(events_of(synthetic, backbone, 4), stats=ASKED)
        prefill.column_sum[0].sum().backward()
    finally:
        backbone.requires_grad_(False)
        backbone.zero_grad()
