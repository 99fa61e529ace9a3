"""Probes of every backbone: they are what a read is, in the layer's own arithmetic, and know nothing of the request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from malloc_bench.state import Ask, Events, MissingStatistic, Prefill, Segment, Stats
from malloc_bench.testing import World, worlds
from malloc_bench.testing.worlds import LENGTHS, close, histories

CASES = [
    "sasrec-2-heads", "hstu-times-2-heads", "lsrm-2-heads", "marm-2-heads", "climber-times-2-heads", "climber-stride",
    "sasrec-gqa", "sasrec-mla", "hstu-times-gqa", "hstu-mla",
]  # fmt: skip


def probed(case, trained, ask, ranking=False):
    backbone = trained(case)
    if ranking:
        backbone.for_ranking()
    try:
        return backbone, World(case, backbone).prefill(Stats(probes=ask))
    finally:
        backbone.scoring = None


@pytest.mark.parametrize("case", CASES)
def test_a_probe_is_a_token_that_reads(case, trained):
    """Layer by layer: what it got and its own value are the mixture of a plain read, and weights come to target."""
    backbone, prefill = probed(case, trained, 6)
    items = prefill.items["probes"][:6].int().expand(len(LENGTHS), 6)
    for view in prefill.apart():
        for layer in view.layers:
            probes, segment = view.probes(layer), view.segment(layer)
            weights, share = probes.weigh(segment)
            close(share, probes.share, "share", 1e-5)
            close(probes.mix(weights, segment), probes.target, "target", 1e-5)
            if probes.normalised:
                close(weights.sum(-1, keepdim=True) + share, torch.ones_like(share), "weights", 1e-5)
            close(probes.columns(segment), weights, "columns", 1e-5)
            some = probes.first(2)
            close(some.weigh(segment)[0], weights[:, :, :2], "the first two", 1e-6)
    tokens = Events(items, torch.full((len(LENGTHS),), 6, dtype=torch.int32))
    if backbone.uses_times:
        history, _ = histories(backbone, LENGTHS)
        last = (history.count.long() - 1).clamp(min=0)[:, None]
        gaps = prefill.items["gaps"][:6]
        times = history.times.gather(1, last) + gaps
        tokens = replace(tokens, times=times, next_times=times + gaps.roll(1))
    positions = prefill.state.length.long()[:, None].expand(-1, 6)
    embedded, outputs = backbone._embed(tokens, positions), []
    for part, view in enumerate(prefill.apart()):  # the layers' own maps around what the probes got
        x = embedded
        for layer in view.layers:
            block, probes = backbone.blocks[part * len(view.layers) + layer], view.probes(layer)
            q, _, gate = block.project(x)
            close(probes.queries, q, "queries", 1e-5)
            x = block.combine(x, probes.target + probes.share * probes.own_values(), gate)
        outputs.append(x)
    if prefill.stacks > 1:
        x = backbone.fusion(torch.stack(outputs, 2), backbone._places(tokens, positions)[1])
    close(backbone._output(x), backbone.read(tokens, prefill.state), "read", 1e-5)


@pytest.mark.parametrize("case", ["sasrec-2-heads", "hstu-times-2-heads", "climber-times-2-heads"])
def test_the_request_cannot_be_seen(case, trained):
    """Neither what will be asked nor when."""
    backbone, before = probed(case, trained, 5)
    history, _ = histories(backbone, LENGTHS)
    last = (history.count.long() - 1).clamp(min=0)[:, None]
    moved = history
    if history.next_times is not None:
        moved = replace(history, next_times=history.next_times.scatter_add(1, last, torch.full_like(last, 99_999)))
    got = backbone.probe(before.state, moved, Stats(probes=5), before.items)
    for layer, probes in zip(before.layers, got):
        for name in ("queries", "target", "share"):
            assert torch.equal(getattr(probes[Ask(5).kind], name), getattr(before.probes(layer), name))


def test_where_probes_stand(trained):
    backbone, prefill = probed("hstu-times-2-heads", trained, Ask(5, "popular", (0, 3)))
    probes = prefill.probes(0)
    length = prefill.state.length.long()
    ahead = probes.positions[:, 0] - length[:, None]
    assert ahead.tolist() == [[0, 3, 0, 3, 0]] * len(LENGTHS)
    history, _ = histories(backbone, LENGTHS)
    newest = history.times.gather(1, (length - 1).clamp(min=0)[:, None])
    gaps = prefill.items["gaps"][:5]
    assert torch.equal(probes.times[:, 0], newest + gaps * (ahead + 1) + gaps.roll(1))
    _, ranked = probed("hstu-times-2-heads", trained, Ask(5, "popular", (0, 3)), ranking=True)
    assert torch.equal(ranked.probes(0).times[:, 0], newest + gaps * (ahead + 1))
    _, long = probed("hstu-times-2-heads", trained, Ask(2, (7, 9), (60,)))
    assert int(long.probes(0).positions.max()) == backbone.max_length


KNOWN = {"drawn": "probes", "even": "even", "popular": "popular"}


@pytest.mark.parametrize("case", ["sasrec-2-heads", "hstu-times-2-heads", "climber-times-2-heads", "marm-2-heads"])
def test_which_items_are_sent(case, trained):
    """Each kind gives what the same items, given by id, give."""
    backbone = trained(case)
    history, tokens = histories(backbone, LENGTHS)
    newest = [x[: int(n)].flip(0).tolist() or [1] for x, n in zip(history.items, history.count)]
    plain = World(case, backbone).prefill(Stats(probes=1))
    last = torch.tensor([x[0] for x in newest])
    asks = {
        "own": [(x * 4)[:4] for x in newest],
        "candidates": [(x * 4)[:4] for x in tokens.items.tolist()],
        "top": [[int(i) for i in x] for x in best(backbone, plain, last, history)],
        **{name: [plain.items[fact][:4].tolist()] * len(LENGTHS) for name, fact in KNOWN.items()},
    }
    for which, want in asks.items():
        prefill = World(case, backbone).prefill(Stats(probes=Ask(4, which)))
        for user, items in enumerate(want):
            given = World(case, backbone).prefill(Stats(probes=Ask(4, tuple(items)))) if user in (2, 5) else None
            if given is not None:
                for layer in prefill.layers:
                    got, by_id = (x.probes(layer).target[user] for x in (prefill, given))
                    close(got, by_id, f"{which} of user {user}", 1e-5)


def best(backbone, prefill, items, history):
    """The four items that are nearest to what the newest event reads when it comes again."""
    b = len(items)
    tokens = Events(items[:, None].int(), torch.ones(b, dtype=torch.int32))
    if backbone.uses_times:
        at = (history.count.long() - 1).clamp(min=0)[:, None]
        times = history.times.gather(1, at) + prefill.items["gaps"][:1]
        tokens = replace(tokens, times=times, next_times=times + prefill.items["gaps"][:1])
    return (backbone.read(tokens, prefill.state)[:, 0] @ backbone.catalogue().T).topk(4).indices + 1


def test_nobody_knows_candidates(trained):
    backbone, _ = probed("sasrec-2-heads", trained, 4)
    history, _ = histories(backbone, LENGTHS)
    with pytest.raises(MissingStatistic, match="nobody knows the tokens"):
        backbone.prepare(history, stats=Stats(probes=Ask(4, "candidates")))


def test_in_ranking_nothing_is_on_top_and_probes_are_drawn(trained):
    ask, tops = Ask(4, "drawn"), Ask(4, "top")
    (_, top), (_, drawn), (_, plain) = (
        probed("sasrec-2-heads", trained, *each) for each in ((tops, True), (ask, True), (tops, False))
    )
    assert torch.equal(top.probes(0, tops).queries, drawn.probes(0, ask).queries)
    assert not torch.equal(plain.probes(0, tops).queries, drawn.probes(0, ask).queries)
    assert Stats(probes=tops).in_ranking() == Stats(probes=ask)


def test_who_stands_for_readers(trained):
    """A third are the last ones; of those ranked by the model the others grow by a factor, from the first on."""
    for which, ranking, rows in (
        ("top", False, [0, 1, 4, 11, 26, 27, 28, 29]),
        ("top", True, range(22, 30)),
        ("drawn", False, range(22, 30)),
    ):
        _, prefill = probed("sasrec-2-heads", trained, Ask(30, which), ranking)
        probes, rows = prefill.probes(0), list(rows)
        some = probes.readers(8)
        assert torch.equal(some.queries, probes.queries[:, :, rows]) and torch.equal(
            some.target, probes.target[:, :, rows]
        )
        close(some.outputs(prefill.state), probes.outputs(prefill.state)[:, rows], "outputs", 1e-5)
        assert probes.readers(30) is probes and probes.readers(1).queries.shape[2] == 1


def test_asks_add_up(trained):
    both = Stats(probes=4, queries=1) | Stats(probes=Ask(9)) | Stats(probes=Ask(3, "popular"))
    assert sorted(both.asks, key=repr) == sorted((Ask(9), Ask(3, "popular")), key=repr)
    prefill = World("x", trained("sasrec-2-heads")).prefill(both)
    assert prefill.probes(0, Ask(4)).queries.shape[2] == 4
    alone = World("x", trained("sasrec-2-heads")).prefill(Stats(probes=4))
    close(prefill.probes(1, Ask(4)).target, alone.probes(1).target, "the first of more", 1e-5)
    with pytest.raises(MissingStatistic):
        prefill.probes(0, Ask(4, "drawn", (1,)))
    with pytest.raises(MissingStatistic):
        World("x", trained("sasrec-2-heads")).prefill(Stats()).probes(0, Ask(4))
    for wrong in ((0,), (3, "rare"), (3, (1, 2)), (3, "drawn", ()), (3, "drawn", (-1,))):
        with pytest.raises(ValueError):
            Ask(*wrong)


def test_what_survives(trained):
    _, prefill = probed("sasrec-2-heads", trained, 4)
    rows = torch.tensor([5, 3])
    some = prefill.take(rows)
    close(some.probes(0).target, prefill.probes(0).target[rows], "taken", 0)
    assert prefill.over(prefill.state).probed is None
    assert prefill.given(None) is prefill


def test_plain_tensors():
    def noise(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    k, v, q = noise(2, 2, 5, 4, seed=0), noise(2, 2, 5, 3, seed=1), noise(2, 4, 7, 4, seed=2)
    prefill = Prefill.from_tensors([k], [v], lengths=torch.tensor([5, 2]), probes=[q])
    probes = prefill.probes(0, Ask(3))
    for user, n in enumerate((5, 2)):
        for head in range(4):
            logits = q[user, head, :3].double() @ k[user, head // 2, :n].double().T / 2
            want = logits.softmax(-1) @ v[user, head // 2, :n].double()
            close(probes.target[user, head].double(), want, "target", 1e-5)
    assert isinstance(prefill.segment(0), Segment) and not bool(probes.share.any())
    with pytest.raises(ValueError, match="probes"):
        Prefill.from_tensors([k], [v], probes=[q[..., :3]])


def test_probes_come_out_of_the_stack_as_tokens_do():
    """Over any state, the last of them, and of some users only."""
    backbone = next(w.backbone for w in worlds() if w.name == "hstu3")
    prefill = World("hstu", backbone).prefill(Stats(probes=6), (5, 23))
    with torch.no_grad():
        probes = prefill.probes(1).last(2)
        tokens = Events(prefill.items["probes"][4:6].int().expand(2, 2), torch.full((2,), 2, dtype=torch.int32))
        close(probes.outputs(prefill.state), backbone.read(tokens, prefill.state), "outputs", 1e-6)
        some = prefill.take(torch.tensor([1]))
        close(some.probes(0).last(2).outputs(some.state), probes.outputs(prefill.state)[1:], "of one user", 1e-5)
