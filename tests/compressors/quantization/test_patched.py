"""Encoders that write vectors in two ways at once against their definitions, in float64 on small inputs."""

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

COUNTS = (1, 3, 9, 30)


@pytest.fixture(scope="module")
def prefill():
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(4, 2, 30, 6, generator=generator) for _ in range(3))
    return Prefill.from_tensors([keys], [values], [queries], lengths=torch.tensor(COUNTS), positions=True)


def fields(prefill, state):
    """Each user's and field's vectors as they were and as they are read, [H, n, D]."""
    for user, n in enumerate(COUNTS):
        for name in ("keys", "values"):
            whole = prefill.segment(0).fields[name].dense()[user, :, :n].double()
            yield user, name, whole, state.layers[0][0].fields[name].dense()[user, :, :n].double()


@pytest.mark.parametrize("score", ["h2o", "value_norm"])
def test_intactkv(prefill, score):
    """Pivots come back as 16-bit floats; the others as the inner encoder writes them beside their own mean."""
    state = get_compressor("intactkv", share=0.2, score=score, inner="int8").compress(prefill)
    scores = get_compressor(score).scores(prefill, 0)
    for user, _, whole, got in fields(prefill, state):
        n = whole.shape[1]
        for head in range(2):
            pivots = sorted(range(n), key=lambda i: -float(scores[user, head, i]))[: -(-n // 5)]
            others = [i for i in range(n) if i not in pivots]
            assert torch.equal(got[head, pivots], whole[head, pivots].half().double())
            step = whole[head, others].abs().amax(-1, keepdim=True) / 127
            assert bool(((got[head, others] - whole[head, others]).abs() <= 0.57 * step + 1e-3).all())


def test_pivots_widen_no_range():
    """Keys share scales along slots: one huge slot would leave the others no digits."""
    keys = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(1))
    keys[0, 0, 7] *= 1000
    values = torch.ones_like(keys)
    values[0, 0, 7] = 9
    prefill = Prefill.from_tensors([keys], [values])
    method = get_compressor("intactkv", share=0.02, score="value_norm", inner={"kivi": {"bits": 8}})
    got = method.compress(prefill).layers[0][0].fields["keys"].dense()
    close(got / keys[0, 0, 7].abs().max(), keys / keys[0, 0, 7].abs().max(), "all", 1e-3)
    rest = [i for i in range(40) if i != 7]
    close(got[:, :, rest], keys[:, :, rest], "others", 0.01)


def test_intactkv_bytes(prefill):
    """30 slots: 4 bytes of marks, 2 pivots of 6 float16, a head and field."""
    inner, whole = (get_compressor(name).compress(prefill).nbytes() for name in ("int4_token", "intactkv"))
    assert (whole - inner).tolist() == [4 * (-(-n // 8) + 12 * -(-n // 20)) for n in COUNTS]


@pytest.mark.parametrize("every", [0, 7])
def test_kvquant(prefill, every):
    method = get_compressor("kvquant", bits=2, every=every)
    fitted = method.fit(prefill)
    state = method.compress(prefill, None, fitted)
    for _, name, whole, got in fields(prefill, state):
        levels = fitted[f"0.{name}"][..., 0].double()  # [H, D, 4]
        near = (whole.unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1)
        want = levels.unsqueeze(1).expand(*whole.shape, 4).gather(3, near.unsqueeze(-1)).squeeze(-1)
        for head in range(2):
            flat, numbers = want[head].flatten(), whole[head].flatten()
            for start in range(0, len(flat) if every else 0, every or 1):
                run = slice(start, start + every)
                worst = start + int((flat[run] - numbers[run]).abs().argmax())
                flat[worst] = numbers[worst].half().double()
            close(got[head].flatten(), flat, name, 1e-5)


def test_levels_are_means_of_what_is_nearest(prefill):
    fitted = get_compressor("kvquant", bits=2).fit(prefill)
    x = torch.cat([prefill.keys(0)[u, :, :16][:, :n] for u, n in enumerate(COUNTS[:3])], 1).double()
    assert fitted["0.keys"].shape == (2, 6, 4, 1)
    few = Prefill.from_tensors([x.float()[None]], [x.float()[None]])
    levels = get_compressor("kvquant", bits=1).fit(few)["0.keys"][..., 0].double()  # converges on 13 numbers
    for head in range(2):
        for d in range(6):
            numbers = x[head, :, d]
            near = (numbers[:, None] - levels[head, d]).abs().argmin(-1)
            want = torch.stack([numbers[near == i].mean() for i in range(2)])
            close(levels[head, d], want, f"{head} {d}", 1e-5)


@pytest.mark.parametrize("every", [0, 16])
def test_gear(prefill, every):
    """Bits of what is left without outliers, plus the best matrix of a rank of all fields' remainders side by side."""
    got = get_compressor("gear", rank=2, every=every).compress(prefill)
    for user, n in enumerate(COUNTS):
        plain, kept = {}, {}
        for name in ("keys", "values"):
            x = prefill.segment(0).fields[name].dense()[user, :, :n].double()
            axis = 1 if name == "keys" else 2
            mean = x.mean(axis, keepdim=True).expand_as(x)
            odd = torch.zeros_like(x, dtype=torch.bool)
            for head in range(2):
                far = (x - mean)[head].abs().flatten()
                for start in range(0, len(far) if every else 0, every or 1):
                    odd[head].view(-1)[start + int(far[start : start + every].argmax())] = True
            plain[name], kept[name] = torch.where(odd, mean, x), odd
        inner = Prefill.from_tensors([plain["keys"][None].float()], [plain["values"][None].float()])
        bits = get_compressor("kivi", bits=2).compress(inner).layers[0][0].fields
        wide, near = [], []
        for name in ("keys", "values"):
            x = prefill.segment(0).fields[name].dense()[user, :, :n].double()
            base = torch.where(kept[name], x.half().double(), bits[name].dense()[0].double())
            wide += [*(x - base)]
            near += [*base]
        u, s, v = torch.linalg.svd(torch.cat(wide, 1), full_matrices=False)
        want = (torch.cat(near, 1) + (u[:, :2] * s[:2]) @ v[:2]).split(6, 1)
        for field, name in enumerate(("keys", "values")):
            made = got.layers[0][0].fields[name].dense()[user, :, :n].double()
            close(made, torch.stack(want[2 * field : 2 * field + 2]), f"{name} {user}", 4e-3)


def test_a_sum_is_read_part_by_part(prefill):
    vectors = get_compressor("gear", every=16).compress(prefill).layers[0][0].fields["keys"]
    q, w = torch.randn(4, 2, 3, 6), torch.rand(4, 2, 3, 30)
    close(vectors.dot(q), q @ vectors.dense().mT, "dot", 1e-4)
    close(vectors.mix(w), w @ vectors.dense(), "mix", 1e-4)
