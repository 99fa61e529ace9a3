import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, peak_memory
from malloc_bench.measure.memory import _Storages

KIB = 1024


def kib(n: int) -> torch.Tensor:
    return torch.empty(n * KIB, dtype=torch.uint8)


def nested():
    def inner():
        a = kib(300)
        b = kib(100)  # 400 inside, on top of 120: the peak
        del a
        return b

    outer = kib(120)
    first = inner()
    del outer
    return first, kib(200)


def freed():
    for _ in range(10):
        kib(50)
    return kib(10)


def views():
    x = kib(64)
    return [x[:10], x.view(-1, 2), x.unfold(0, 2, 1), x.expand(5, -1), x.detach()]


def in_place():
    x = kib(64)
    x.add_(1).mul_(3).clamp_(0, 5)
    torch.bitwise_or(x, x, out=x)
    return x.zero_()


def grown():
    x = kib(8)
    return x.resize_(40 * KIB)


def made_of_numbers():
    return torch.tensor([0.0] * 256)


def of_two_outputs():
    return torch.zeros(256).sort()  # float32 values, int64 indices


CASES = [
    (nested, 520),
    (freed, 50),
    (views, 64),
    (in_place, 64),
    (grown, 40),
    (made_of_numbers, 1),
    (of_two_outputs, 4),
]


@pytest.mark.parametrize("call, expected", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_peak_is_exact(call, expected, mode):
    with mode():
        _, peak = peak_memory(call)
    assert peak == expected * KIB


def test_memory_from_before_is_not_counted_but_what_is_made_of_it_is():
    old = kib(100)
    result, peak = peak_memory(lambda: (old[:5], old.add_(1), old.clone()))
    assert peak == 100 * KIB
    assert result[1] is old


def test_nothing_is_live_after_the_result_is_gone():
    tracker = _Storages()
    with tracker:
        x = [kib(5), kib(6)]
    assert tracker.now == tracker.peak == 11 * KIB
    del x
    assert tracker.now == 0 and not tracker.sizes


def test_temporaries_of_compound_operators_are_seen_in_inference_mode():
    x, weight, bias = torch.ones(2, 8, 16), torch.ones(4, 16), torch.ones(4)
    peaks = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            peaks.append(
                peak_memory(lambda: F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), torch.ones(16).long()))[1]
            )
    assert peaks[0] == peaks[1]


def test_an_exception_passes_and_leaves_no_mode_behind():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    gc.collect()
    x = kib(1)
    dead = weakref.ref(x)
    del x
    assert dead() is None


@pytest.mark.parametrize("backbone", ["sasrec", "hstu"])
def test_a_state_takes_the_bytes_that_it_says(backbone):
    work = Workload(users=3, history=50)
    model = get_backbone(backbone, 100, True, max_length=51).eval()
    with torch.inference_mode():
        full = work.prefill(model)
        _, copied = peak_memory(lambda: full.state.map(torch.clone))
        assert copied == int(full.state.nbytes().sum())
        smaller, peak = peak_memory(lambda: get_compressor("recent").compress(full, Budget(0.5)))
        assert int(smaller.nbytes().sum()) <= peak
        _, prefill = peak_memory(lambda: work.prefill(model))
        assert prefill > copied
