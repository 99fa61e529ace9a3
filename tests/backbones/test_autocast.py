"""Every backbone trains in bfloat16 as it does in float32, whatever the loss: on a CPU that emulates it, too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.backbones.losses import next_item_loss, sampled_loss
from malloc_bench.compressors import get_compressor
from malloc_bench.registry import names
from malloc_bench.state import Batch, Events

ITEMS, USERS, LENGTH = 60, 6, 12

#: (name, parameters beside the tiny sizes, structural compressor or None)
CASES: list[tuple[str, dict[str, Any], tuple[str, dict[str, Any]] | None]] = [
    ("sasrec", {}, None),
    ("sasrec", {"head": "dot"}, None),
    ("sasrec", {"block": "paper", "head": "dot"}, None),
    ("sasrec", {}, ("gqa", {"n_kv_heads": 1})),
    ("sasrec", {}, ("mla", {"latent": 6})),
    ("hstu", {}, None),
    ("hstu", {"head": "dot"}, None),
    ("hstu", {}, ("mqa", {})),
    ("lsrm", {}, None),
    ("lsrm", {"head": "cosine"}, None),
    ("marm", {}, None),
    ("marm", {"search": "dot", "top_k": 4}, None),
    ("marm", {"search": "group", "top_k": 4, "groups": 4}, None),
    ("climber", {"blocks": 1}, None),
    ("climber", {"blocks": 2, "head": "dot"}, None),
    ("climber", {"blocks": 2, "strategy": "part_of_day", "scenario": "weekend"}, None),
    ("gated_delta", {}, None),
    ("rwkv", {}, None),
    ("fuxi", {}, None),
]


def made(name: str, params: dict[str, Any], structural: tuple[str, dict[str, Any]] | None) -> Backbone:
    torch.manual_seed(0)
    backbone = get_backbone(name, ITEMS, True, layers=2, heads=2, dim=16, max_length=LENGTH, dropout=0.0, **params)
    if structural:
        get_compressor(structural[0], **structural[1]).adapt(backbone)
    return backbone.train()


def events(count: Tensor, seed: int) -> Events:
    draw = torch.Generator().manual_seed(seed)
    shape = len(count), int(count.max())
    real = torch.arange(shape[1]) < count[:, None]
    times = torch.randint(1, 90_000, shape, generator=draw).cumsum(1)
    items = torch.randint(1, ITEMS + 1, shape, generator=draw, dtype=torch.int32)
    later = times + torch.randint(1, 90_000, shape, generator=draw)
    return Events(items * real, count, times * real, later * real)


def asked(backbone: Backbone, loss: str) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    count = torch.tensor([LENGTH, 1, 5, 7, LENGTH, 3], dtype=torch.int32)
    history = events(count, 1)
    if loss == "ranking":
        labels = torch.rand(USERS, 4, generator=draw) < 0.5
        tokens = events(torch.full((USERS,), 4, dtype=torch.int32), 2)
        return backbone.ranking_loss(history, tokens, labels)
    targets = torch.randint(1, ITEMS + 1, history.items.shape, generator=draw, dtype=torch.int32) * history.mask()
    negatives = torch.randint(1, ITEMS + 1, (USERS, 8), generator=draw) if loss == "sampled" else None
    return backbone.loss(Batch(history, targets, negatives))


#: What CUDA's autocast computes in float32 where a CPU's stays in bfloat16.
WIDE = {
    "binary_cross_entropy_with_logits", "cross_entropy", "cumsum", "exp", "layer_norm", "log", "log_softmax",
    "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rms_norm", "rsqrt", "softmax", "softplus", "sum",
    "vector_norm",
}  # fmt: skip


class LikeCuda(TorchFunctionMode):
    """Within a CPU's autocast: types meet as they do on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WIDE:
            args = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x, args)
        return func(*args, **(kwargs or {}))


def test_every_backbone_is_here() -> None:
    assert {name for name, *_ in CASES} == set(names("backbones"))


@pytest.mark.parametrize("device", ["cpu", "like cuda"])
@pytest.mark.parametrize("loss", ["full", "sampled", "ranking"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_trains_as_float32_does(case: Any, loss: str, device: str) -> None:
    found: dict[bool, tuple[float, Tensor]] = {}
    for amp in (False, True):
        backbone = made(*case)
        if loss == "ranking":
            backbone.for_ranking()
        mode = LikeCuda() if device == "like cuda" and amp else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), mode:
            value = asked(backbone, loss)
        value.backward()
        gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        assert all(bool(g.isfinite().all()) and g.dtype == torch.float32 for g in gradients.values())
        found[amp] = float(value.detach()), torch.cat([g.flatten() for g in gradients.values()])
    (plain, straight), (half, near) = found[False], found[True]
    assert half == pytest.approx(plain, rel=0.05)
    searches = case[1].get("search", "none") != "none"  # rounding may find other slots
    assert torch.cosine_similarity(straight, near, dim=0) > (0.8 if searches else 0.95)


@pytest.mark.parametrize("narrow", [("hidden",), ("table",), ("hidden", "table")], ids=str)
def test_losses_take_either_side_in_bfloat16(narrow: tuple[str, ...]) -> None:
    """What CUDA's autocast leaves wide and what a CPU's does is not the same."""
    torch.manual_seed(0)
    wide = {"hidden": torch.randn(2, 5, 8), "table": torch.randn(20, 8)}
    given = {name: (x.bfloat16() if name in narrow else x.clone()).requires_grad_() for name, x in wide.items()}
    targets, negatives = torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 6))
    for amp in (False, True):
        if not amp and len(narrow) == 1:  # products of two types need autocast
            pairs = [next_item_loss(given["hidden"].flatten(0, 1), given["table"], targets.flatten())]
            want = [next_item_loss(wide["hidden"].flatten(0, 1), wide["table"], targets.flatten())]
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                pairs = [
                    next_item_loss(given["hidden"].flatten(0, 1), given["table"], targets.flatten()),
                    sampled_loss(given["hidden"], given["table"], targets, negatives),
                ]
            want = [
                next_item_loss(wide["hidden"].flatten(0, 1), wide["table"], targets.flatten()),
                sampled_loss(wide["hidden"], wide["table"], targets, negatives),
            ]
        for x, y in zip(pairs, want):
            assert float(x.detach()) == pytest.approx(float(y), rel=0.05)
            x.backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype and bool(x.grad.isfinite().all()) for x in given.values())
