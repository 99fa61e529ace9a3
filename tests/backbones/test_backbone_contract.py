"""Every backbone keeps every promise on trained weights."""

import pytest

from malloc_bench.backbones import attention, block, climber, folded, fuxi, hstu
from malloc_bench.registry import names
from malloc_bench.testing import Check, backbone_checks, check_backbone, histories
from malloc_bench.testing.backbones import BACKBONE_PROMISES
from malloc_bench.testing.worlds import LENGTHS, close

CASES = (
    "sasrec", "sasrec-2-heads", "sasrec-paper-2-heads", "hstu-times", "hstu-times-2-heads", "hstu", "hstu-2-heads",
    "lsrm-2-heads", "sasrec-gqa", "sasrec-mla", "hstu-times-gqa", "hstu-mla", "lsrm-mqa",
    "sasrec-longformer", "sasrec-linformer", "sasrec-reformer", "hstu-times-beacon",
    "marm", "marm-2-heads", "climber", "climber-times-2-heads", "climber-stride", "gated_delta", "gated_delta-2-heads",
    "rwkv-2-heads", "fuxi", "fuxi-times-2-heads",
)  # fmt: skip


def test_every_registered_backbone_is_here():
    assert {case.split("-")[0] for case in CASES} == set(names("backbones"))


@pytest.mark.parametrize("promise", BACKBONE_PROMISES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("case", CASES)
def test_promise(case, promise, trained):
    backbone = trained(case)
    backbone.requires_grad_(promise.__name__ == "loss_reaches_every_parameter")
    try:
        Check(promise, (backbone,), case)()
    finally:
        backbone.requires_grad_(False)


MEMORIES = "gated_delta", "rwkv", "sasrec-linformer"


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(MEMORIES)])
def test_blocks_do_not_change_results(case, trained, monkeypatch):
    backbone = trained(case)
    history, tokens = histories(backbone, LENGTHS)
    stats = attention.Stats(column_sum=True, window=4)
    prefill = backbone.prefill(history, stats=stats)
    outputs, plain = backbone.read(tokens, prefill.state), backbone(history)
    for module in (attention, folded):
        monkeypatch.setattr(module, "CELLS", 1)
    for module in (block, hstu, climber, fuxi):
        monkeypatch.setattr(module, "BLOCK", 7)
    close(backbone.read(tokens, prefill.state), outputs, "read, one query at a time", 1e-5)
    close(backbone(history), plain, "plain pass, 7 queries at a time", 1e-5)
    again = backbone.prefill(history, stats=stats)
    for layer in prefill.layers:
        close(again.attention_received(layer), prefill.attention_received(layer), "column sums", 1e-5)
        close(again.newest_attention(layer, 4), prefill.newest_attention(layer, 4), "window", 1e-5)


def test_a_broken_backbone_is_caught(trained, monkeypatch):
    backbone = trained("hstu")
    check = {str(c): c for c in backbone_checks(backbone)}
    check["hstu-read_equals_forward"]()
    position_bias = backbone.blocks[0].logits
    monkeypatch.setattr(
        backbone.blocks[0],
        "logits",
        lambda q, s, queries, slots: position_bias(q, s, queries, slots) + (s.slots is None),
    )
    monkeypatch.setattr(backbone.blocks[0], "weighing", None)  # as of a class with logits of its own
    with pytest.raises(AssertionError):
        check["hstu-read_equals_forward"]()


def test_check_backbone_restores_the_mode(trained):
    backbone = trained("sasrec").train()
    backbone.requires_grad_(True)
    try:
        check_backbone(backbone)
        assert backbone.training
    finally:
        backbone.eval().requires_grad_(False)
