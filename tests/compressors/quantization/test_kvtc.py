"""Transform coding against its definition, in float64 on small inputs."""

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

COUNTS = (0, 2, 9, 16)


def prefill_of(seed):
    """Two layers and heads of width 4 that hang together: 16 numbers from 5."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(9))
    wide = [torch.randn(4, 16, 5, generator=generator) @ m + 3 for m in maps]
    fields = [[x.view(4, 16, 2, 2, 4)[:, :, layer].transpose(1, 2).contiguous() for layer in (0, 1)] for x in wide]
    return Prefill.from_tensors(*fields, lengths=torch.tensor(COUNTS))


def side_by_side(prefill, name):
    """[B, S, 16]"""
    fields = [prefill.segment(i).fields[name].dense().double() for i in prefill.layers]
    return torch.cat([x.transpose(1, 2).flatten(2) for x in fields], -1)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_kvtc(name):
    sample, plain, method = prefill_of(0), prefill_of(1), get_compressor("kvtc", bits=1)
    fitted = method.fit(sample)
    x = torch.cat([side_by_side(sample, name)[user, :n] for user, n in enumerate(COUNTS)])
    mean, rows = x.mean(0), fitted[f"0.{name}.rows"].double()
    close(fitted[f"0.{name}.mean"].double(), mean, "mean", 1e-5)
    assert len(rows) == 5  # what carries nothing is left out
    want = torch.linalg.svd(x - mean).Vh[:5]
    close((rows @ want.T).abs(), torch.eye(5).double(), "principal components", 1e-4)

    step = float(fitted[f"0.{name}.step"])
    codes = ((x - mean) @ rows.T / step).round()
    length = 0.0
    for column in codes.T:
        share = column.unique(return_counts=True)[1] / len(column)
        length -= float((share * share.log2()).sum())
    assert length / 16 == pytest.approx(1, abs=0.1)

    state = method.compress(plain, None, fitted)
    most = fitted[f"0.{name}.shares"].shape[1] // 2
    exact = side_by_side(plain, name)
    rounded = ((exact - mean) @ rows.T / step).round().clamp(-most, most) * step @ rows + mean
    got = torch.cat([s.fields[name].dense().transpose(1, 2).flatten(2) for s in state.segments()], -1).double()
    for user, n in enumerate(COUNTS):
        assert float((got[user, :n] - rounded[user, :n]).abs().gt(1e-3).double().mean() if n else 0) < 0.05  # at edges


def test_one_stream_a_field_and_a_read_in_the_turned_frame():
    plain = prefill_of(1)
    method = get_compressor("kvtc", bits=2)
    state = method.compress(plain, None, method.fit(prefill_of(0)))
    lefts = {id(v.coefficients): v.coefficients for s in state.segments() for v in s.fields.values()}
    assert len(lefts) == 2  # both layers share theirs
    words = sum(left.size[:, 0] for left in lefts.values())
    assert state.nbytes().tolist() == (4 + 4 + 2 * 4 + 4 * words).tolist()
    q, w = torch.randn(4, 2, 3, 4), torch.rand(4, 2, 3, 16)
    for segment in state.segments():
        for vectors in segment.fields.values():
            close(vectors.dot(q), q @ vectors.dense().mT, "dot", 1e-4)
            close(vectors.mix(w), w @ vectors.dense(), "mix", 1e-4)


def test_more_bits_less_error():
    sample, plain, errors = prefill_of(0), prefill_of(1), []
    for bits in (0.5, 1, 2):
        method = get_compressor("kvtc", bits=bits)
        state = method.compress(plain, None, method.fit(sample))
        error = 0.0
        for whole, made in zip(plain.state.segments(), state.segments()):
            for name in whole.fields:
                gap = (whole.fields[name].dense() - made.fields[name].dense()).transpose(1, 2)[plain.mask(0)[:, 0]]
                error += float(gap.square().sum())
        errors.append(error)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
