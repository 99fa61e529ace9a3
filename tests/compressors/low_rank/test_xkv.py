"""One factor for the keys of all layers and one for the values: the best of a rank, and its bytes."""

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

COUNTS = (1, 3, 9, 14)


def prefill():
    generator = torch.Generator().manual_seed(0)
    keys, values = ([torch.randn(4, 2, 14, d, generator=generator) for _ in range(3)] for d in (4, 3))
    return Prefill.from_tensors(keys, values, lengths=torch.tensor(COUNTS))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_xkv(rank):
    full = prefill()
    state = get_compressor("xkv", rank=rank, dtype="float32").compress(full)
    for user, n in enumerate(COUNTS):
        for name in ("keys", "values"):
            wide = [full.segment(i).fields[name].dense()[user, :, :n].double() for i in full.layers]
            wide = torch.cat([x.transpose(0, 1).flatten(1) for x in wide], 1)
            u, s, v = torch.linalg.svd(wide, full_matrices=False)
            got = [state.layers[i][0].fields[name].dense()[user, :, :n].double() for i in full.layers]
            got = torch.cat([x.transpose(0, 1).flatten(1) for x in got], 1)
            close(got, (u[:, :rank] * s[:rank]) @ v[:rank], name, 1e-4)
    if rank == 2:
        fits = [min(2, n) for n in COUNTS]
        own = 3 * 2 * (4 + 3)  # of three layers and two heads
        assert state.nbytes().tolist() == [8 + 2 * 8 + 4 * r * (2 * n + own) for n, r in zip(COUNTS, fits)]


def test_it_is_told_from_svd():
    for name, share in (("svd", "field"), ("xkv", "all")):
        with pytest.raises(ValueError, match=f"^{name}: share "):
            get_compressor(name, share=share)
