"""Which heads are dropped, by definition, what is stored of them, and what is read."""

import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill

COUNTS = (0, 1, 5, 9)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefill(draw=0, dtype=torch.float32):
    """Two layers of three stored heads, each of two query heads; heads differ in size."""
    size = torch.tensor([[1.0, 4, 2], [0.5, 0.1, 8]])[:, None, :, None, None]
    keys, values = (noise(2, 4, 3, 9, 6, seed=2 * draw + i) * size + size for i in range(2))
    maps = [noise(6, 6, 5, seed=50 + layer) for layer in range(2)]
    made = [list(x.to(dtype)) for x in (keys, values)]
    return Prefill.from_tensors(*made, lengths=torch.tensor(COUNTS), outputs=maps)


def by_definition(made):
    found = {}
    for layer in range(2):
        maps = made.output_map(layer).double()
        for head in range(3):
            rows = torch.cat([made.values(layer)[u, head, :n] for u, n in enumerate(COUNTS)]).double()
            found[layer, head] = float(maps[2 * head : 2 * head + 2].norm() * rows.square().sum(1).mean().sqrt())
    return found


def test_the_least_important_heads_of_all_layers_are_read_as_means():
    sample, made = prefill(1), prefill(2)
    importance = by_definition(sample)
    for keep in (0.2, 0.5, 0.7):
        method = get_compressor("head_prune", keep=keep)
        state = method.compress(made, fitted=method.fit(sample))
        first = {max(((layer, head) for head in range(3)), key=importance.get) for layer in range(2)}
        rest = sorted(set(importance) - first, key=importance.get, reverse=True)
        kept = first | set(rest[: max(0, round(keep * 6) - 2)])
        assert state.nbytes().tolist() == [8 + n * len(kept) * 2 * 6 * 4 for n in COUNTS]
        for layer, (segment,) in enumerate(state.layers):
            for name, vectors in segment.fields.items():
                whole, given = vectors.dense(), sample.segment(layer).fields[name].dense()
                for head in range(3):
                    mean = torch.cat([given[u, head, :n] for u, n in enumerate(COUNTS)]).mean(0)
                    own = made.segment(layer).fields[name].dense()[:, head]
                    want = own if (layer, head) in kept else mean.expand_as(own)
                    assert torch.allclose(whole[:, head], want, atol=1e-5)


def test_half_precision_stays():
    method = get_compressor("head_prune")
    state = method.compress(prefill(2, torch.bfloat16), fitted=method.fit(prefill(1)))
    assert state.layers[0][0].fields["keys"].dense().dtype == torch.bfloat16
