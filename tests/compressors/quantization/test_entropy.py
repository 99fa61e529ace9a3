"""Entropy-coded sizes are lengths of real bytes that decode to the same integers."""

import math
from collections import Counter

import constriction
import numpy as np
import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Prefill, integers
from malloc_bench.testing import World
from malloc_bench.testing.compressors import uses_the_budget

COUNTS = (0, 1, 9, 40)


def prefill_of(seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(4, 2, 40, 6, generator=generator) + torch.arange(6) for _ in range(2))
    return Prefill.from_tensors([keys], [values], lengths=torch.tensor(COUNTS))


@pytest.mark.parametrize("inner", ["int4_token", {"turboquant": {"bits": 2}}, "pq", {"kivi": {"bits": 3}}])
def test_it_is_read_as_the_inner_encoder_and_takes_what_the_coder_wrote(inner):
    method, plain = get_compressor("entropy", inner=inner), prefill_of(1)
    fitted = method.fit(prefill_of(0))
    state = method.compress(plain, None, fitted)
    part = fitted.part("inner") if method.inner.fit_parts() else None
    bare = method.inner.compress(plain, None, part)
    back = state.take(torch.tensor([1])).unpack([state.pack(user) for user in range(4)])
    for name in ("keys", "values"):
        want, got = bare.layers[0][0].fields[name], back.layers[0][0].fields[name]
        codes, again = integers(want), integers(got.decoded())
        table = fitted[f"tables/0.{name}"].numpy()
        for user, n in enumerate(COUNTS):
            assert torch.equal(codes[user, :, :n], again[user, :, :n])
            assert torch.equal(want.dense()[user, :, :n], got.dense()[user, :, :n])
            coder, ideal = constriction.stream.queue.RangeEncoder(), 0.0
            for head in range(2):
                for place in range(codes.shape[3]):
                    column = codes[user, head, :n, place].numpy().astype(np.int32)
                    coder.encode(column, constriction.stream.model.Categorical(table[head, place], perfect=False))
                    ideal -= sum(math.log2(table[head, place, c]) for c in column)
            words = coder.get_compressed()
            assert int(got.size[user, 0]) == len(words) <= ideal / 32 + 2
            assert bytes(words) == got.words[user, 0, : len(words), 0].numpy().tobytes()


def test_tables_are_shares_of_training_codes():
    sample = prefill_of(0)
    fitted = get_compressor("entropy").fit(sample)
    codes = integers(get_compressor("int4_token").compress(sample).layers[0][0].fields["keys"])
    for head in range(2):
        for place in range(6):
            seen = Counter(int(c) for user, n in enumerate(COUNTS) for c in codes[user, head, :n, place])
            want = [(seen[code] + 0.5) / (sum(COUNTS) + 8) for code in range(16)]
            assert fitted["tables/0.keys"][head, place].tolist() == pytest.approx(want, rel=1e-5)


def test_a_chain_lands_on_its_budget_by_coding():
    world = World("tensors")
    method = get_compressor("compose", steps=("recent", "entropy"))
    uses_the_budget(method, world.fit(method))
    prefill = world.fit(method).prefill(method.needs)
    bare = get_compressor("compose", steps=("recent", "int4_token"))
    k, plain = method.slots(prefill, Budget(0.1)), bare.slots(prefill, Budget(0.1))
    assert bool((k >= plain - 1).all()) and k.tolist() != [0] * len(k)


def test_a_stream_that_nobody_wrote_is_refused():
    method, plain = get_compressor("entropy"), prefill_of(1)
    state = method.compress(plain, None, method.fit(prefill_of(0)))
    blob = bytearray(state.pack(3))
    with pytest.raises(ValueError):
        state.unpack([bytes(blob[:-4])])


def test_what_has_no_codes_is_named():
    with pytest.raises(ValueError, match="integer codes is needed, not one of Rounded"):
        get_compressor("entropy", inner="float16").fit(prefill_of(0))
