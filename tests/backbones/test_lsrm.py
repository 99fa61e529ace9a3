"""LSRM: the paper's sizes to the last parameter, dropout that falls with height, faults in a word."""

import pytest
import torch

from malloc_bench.backbones import attention, get_backbone, lsrm, spelt_out
from malloc_bench.backbones.lsrm import LSRM, Scale
from malloc_bench.state import Events

THREE = Events(torch.tensor([[1, 2, 3]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))


@pytest.mark.parametrize(
    ("preset", "layers", "heads", "dim", "published"),
    [
        ("98k", 2, 2, 64, "98.3K"),
        ("786k", 4, 4, 128, "786K"),
        ("1.57m", 8, 4, 128, "1.57M"),
        ("9.44m", 12, 8, 256, "9.44M"),
        ("75.5m", 24, 8, 512, "75.5M"),
        ("829m", 48, 24, 1200, "829M"),
    ],
)
def test_the_papers_sizes_have_the_papers_counts(preset, layers, heads, dim, published):
    """Beside the embeddings, and to as many digits as the paper gives."""
    with torch.device("meta"):
        backbone = get_backbone("lsrm", 26_427, preset=preset)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert (len(backbone.blocks), backbone.blocks[0].heads, backbone.catalogue().shape[1]) == (layers, heads, dim)
    embeddings = (backbone.items, backbone.positions)
    count = sum(p.numel() for p in backbone.parameters()) - sum(table.weight.numel() for table in embeddings)
    unit = {"K": 1e3, "M": 1e6}[published[-1]]
    digits = len(published.partition(".")[2]) - 1 if "." in published else 0
    assert count == 12 * layers * dim**2 and f"{count / unit:.{digits}f}{published[-1]}" == published


def test_every_preset_is_tried():
    assert list(LSRM.presets) == ["98k", "786k", "1.57m", "9.44m", "75.5m", "829m"]


def test_sizes_that_are_given_go_before_the_presets():
    assert spelt_out(LSRM, {"heads": 2, "preset": "786k", "dim": 32}) == {"layers": 4, "heads": 2, "dim": 32}
    assert Scale() == Scale(**LSRM.presets["98k"]) != Scale(**LSRM.presets["1.57m"])


@pytest.mark.parametrize(
    ("low", "top", "layers", "rates"),
    [
        (0.5, 0.1, 5, [0.5, 0.4, 0.3, 0.2, 0.1]),
        (0.0, 0.3, 4, [0.0, 0.1, 0.2, 0.3]),
        (0.2, 0.2, 2, [0.2, 0.2]),
        (0.4, 0.1, 1, [0.4]),
    ],
)
def test_dropout_goes_from_the_lowest_to_the_highest_layer(low, top, layers, rates, monkeypatch):
    """As the config has it, as the blocks keep it, and as it is drawn, twice in a layer and once below."""
    backbone = get_backbone("lsrm", 9, layers=layers, heads=1, dim=4, dropout=low, dropout_top=top)
    assert [block.rate for block in backbone.blocks] == pytest.approx(rates)
    drawn = []
    for place in (attention, lsrm):
        monkeypatch.setattr(place, "dropout", lambda x, rate, training: drawn.append((rate, training)) or x)
    for training in (True, False):
        drawn.clear()
        backbone.train(training)(THREE)
        assert [rate for rate, _ in drawn] == pytest.approx([low, *(rate for rate in rates for _ in range(2))])
        assert {mode for _, mode in drawn} == {training}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"preset": "1b"}, "preset must be one of 98k, 786k, 1.57m, 9.44m, 75.5m, 829m, not 1b"),
        ({"dropout_top": 1.0}, r"dropout_top must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"dim": 50, "heads": 4}, "dim must be a multiple of heads, not 50 with 4 heads"),
        ({"droput_top": 0.1}, "backbone lsrm has no parameter 'droput_top'. Did you mean 'dropout_top'"),
    ],
)
def test_faults(params, words):
    with pytest.raises(ValueError, match=words):
        get_backbone("lsrm", 5, **params)


@pytest.mark.parametrize(("head", "norm"), [("cosine", 1.0), ("dot", 8.0)])
def test_outputs_have_the_length_of_their_head(head, norm):
    """One for cosine; the square root of the width for dot products, whose items stay as long as they are."""
    backbone = get_backbone("lsrm", 9, head=head).eval()
    lengths = backbone(THREE).norm(dim=-1)
    assert lengths.flatten().tolist() == pytest.approx([norm] * 3, rel=1e-2)
    assert torch.equal(backbone.catalogue(), backbone.items.weight[1:]) == (head == "dot")
