"""Latents with fitted bases against principal components by their definition, in float64."""

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill
from malloc_bench.testing import World
from malloc_bench.testing.worlds import close

COUNTS = (0, 1, 3, 9, 14)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefill(seed=0, lengths=COUNTS):
    keys, values = ([noise(len(lengths), 2, 14, d, seed=seed + 10 * i + d) + i for i in range(2)] for d in (4, 3))
    return Prefill.from_tensors(keys, values, lengths=torch.tensor(lengths))


def wide(full, user, n, fields):
    """[n, N] of one user, heads and fields side by side, float64."""
    found = [full.segment(layer).fields[field].dense()[user, :, :n].double() for layer, field in fields]
    return torch.cat([x.transpose(0, 1).flatten(1) for x in found], 1)


@pytest.mark.parametrize("share", ["all", "layer", "field"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_eigen_projects_on_the_principal_components_of_training_users(share, rank):
    full, training = prefill(), prefill(seed=77, lengths=(14,) * 8)
    method = get_compressor("eigen", rank=rank, share=share, dtype="float32")
    state = method.compress(full, fitted=method.fit(training))
    each = [(layer, field) for layer in range(2) for field in ("keys", "values")]
    groups = {"all": [each], "layer": [each[:2], each[2:]], "field": [[one] for one in each]}[share]
    for group in groups:
        seen = torch.cat([wide(training, user, 14, group) for user in range(8)])
        mean = seen.mean(0)
        _, _, basis = torch.linalg.svd(seen - mean, full_matrices=False)
        for user, n in enumerate(COUNTS):
            x = wide(full, user, n, group)
            got = [state.layers[layer][0].fields[field].dense()[user, :, :n].double() for layer, field in group]
            got = torch.cat([y.transpose(0, 1).flatten(1) for y in got], 1)
            close(got, (x - mean) @ basis[:rank].mT @ basis[:rank] + mean, f"user {user}", 1e-4)


def test_eigen_bytes():
    """A length, a count, and for each latent a rank, a scale and two bytes a slot and rank."""
    full = prefill()
    for share, latents in (("all", 1), ("layer", 2), ("field", 4)):
        method = get_compressor("eigen", rank=3, share=share)
        state = method.compress(full, fitted=method.fit(prefill(seed=7)))
        assert state.nbytes().tolist() == [8 + latents * (8 + 2 * 3 * n) for n in COUNTS]


@pytest.mark.parametrize("name", ["sasrec-2-heads", "sasrec-paper-2-heads", "hstu-2-heads", "climber-times-2-heads"])
def test_palu_of_full_rank_is_exact(name, trained):
    world, method = World(name, trained(name)), get_compressor("palu", rank=16, dtype="float32")
    world = world.fit(method)
    full = world.prefill(method.needs)
    close(world.read(method.compress(full)), world.read(full.state), "read", 1e-4)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_palu_is_the_best_factoring_for_training_inputs(rank, trained):
    """E |x W - x A B|^2 over training users is the sum of the eigenvalues that are left out, and no less can be."""
    world, method = World("sasrec-2-heads", trained("sasrec-2-heads")), get_compressor("palu", rank=rank)
    training = world.sample(method)
    fitted = method.fit(training)
    for layer in training.layers:
        projection = training.projection(layer)
        x = projection.normed(training.layer_input(layer))[training.mask(layer)[:, 0]].double()
        w = torch.cat([projection[f].double().transpose(0, 1).flatten(1) for f in ("keys", "values")], 1)
        a, b = fitted[f"{layer}.down"].double()[:, :rank], fitted[f"{layer}.up"].double()[:rank]
        left_out = torch.linalg.svdvals(x @ w)[rank:].square().sum()
        error = (x @ w - x @ a @ b).square().sum()
        assert abs(float(error - left_out)) <= 1e-3 * float(torch.linalg.svdvals(x @ w).square().sum())
