"""What methods learn of training users, through the real runner: of whom, when, once, and with what it is charged."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from malloc_bench import registry
from malloc_bench.compressors import Eviction
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.splits import RULES, get_split
from malloc_bench.data.tasks.tasks import Ranking
from malloc_bench.data.tasks.trained import ends, facts, histories, sampled
from malloc_bench.report.tables import render_table
from malloc_bench.results import load_results, read_rows
from malloc_bench.run import fits
from malloc_bench.state import Fitted, Stats
from tests.run.test_identity import World, world  # noqa: F401

SEEN: list[tuple[int, list[int], list[int]]] = []  # (user id, items, times) of each history that a fit was shown
LEARNED: list[float] = []  # what each fit came to


@pytest.fixture
def spy(monkeypatch):
    """A method that notes whom it was fitted to, and scores by what it learned."""
    for kind in ("backbones", "compressors"):
        registry.names(kind)  # all are there before the copy
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    SEEN.clear()
    LEARNED.clear()

    @registry.register("spy")
    @dataclass(frozen=True)
    class Spy(Eviction):
        sign: float = 1.0
        other: int = 0
        family, paper, formula, stores = "eviction", "none", "score = c |v|", "k events"
        fit_fields = ("sign",)

        def fit(self, sample, budget=None):
            total = torch.zeros(3)
            for prefill in sample:
                total += prefill.values(0).sum((0, 1, 2))[:3]
                events = prefill.events
                for user, n, items, times in zip(prefill.users, events.count, events.items, events.next_times):
                    SEEN.append((int(user), items[:n].tolist(), times[:n].tolist()))
            LEARNED.append(float(total[0]))
            return Fitted({"total": total * self.sign})

        def scores(self, prefill, layer):
            return prefill.values(layer).norm(dim=-1) * prefill.fitted["total"][0].sign()

    return Spy


def rows_of(world, **suite):  # noqa: F811
    result, row = world.run(budgets=[0.3], **suite)
    return result, row


@pytest.mark.parametrize("split", ["leave_one_out", "temporal", "ratio"])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_nothing_after_the_end_of_training_is_seen(world, spy, split, task):  # noqa: F811
    _, row = rows_of(world, compressors=["spy"], split=split, tasks=[task])
    data = get_dataset("toy")
    cut = get_split(RULES[split](), data) if task == "retrieval" else Ranking().cut(data, RULES[split]())
    shown = cut if task == "retrieval" else cut.shown
    last = {}
    for user, end in enumerate(cut.train_end):
        start = (cut.dataset if task == "retrieval" else shown).offsets[user]
        own = (cut.dataset if task == "retrieval" else shown).times[start:end]
        last[int(data.user_ids[user])] = int(own[-1]) if len(own) else -1
    assert SEEN
    for user, items, times in SEEN:
        assert len(items) >= 1 and max(times) <= last[user]  # when the newest was asked for, it had not happened
        place = int(np.flatnonzero(data.user_ids == user)[0])
        own = cut.dataset.items[cut.dataset.offsets[place] : ends(cut)[place] - 1][
            -11:
        ]  # of 12 that are kept one reads
        assert items == own.tolist()
    assert row["bytes_fixed"] == 12 and len(row["hashes"]["fit"]) == 64


def test_a_fit_is_made_once_and_kept_beside_the_weights(world, spy, monkeypatch):  # noqa: F811
    step = {"spy": {"other": 1}}
    both = ["spy", step, {"compose": ["spy", "int8"]}]
    result, _ = rows_of(world, compressors=both)
    assert result.ok == 3 and len(LEARNED) == 1, "parameters that do not count make no other fit, nor do chains"
    rows = {row["compressor"]: row for row in read_rows(world.folder / "run" / "rows")}
    assert {row["bytes_fixed"] for row in rows.values()} == {12.0}
    assert len({row["fit_seconds"] for row in rows.values()}) == 1, "of the one fit"
    assert 0 < rows["spy"]["fit_seconds"] < 30
    (about,) = (world.folder / "home" / "checkpoints").glob("*/fits/spy-*/fit.json")
    assert json.loads(about.read_text())["fit"] == rows["spy"]["hashes"]["fit"]
    _, again = rows_of(world, out="again", compressors=["spy"])
    assert len(LEARNED) == 1 and again["fit_seconds"] == rows["spy"]["fit_seconds"], "it took that when it was made"
    shown = render_table(load_results(world.folder / "run"), "resources")
    assert "fit (s, once)" in shown
    rows_of(world, out="other", compressors=[{"spy": {"sign": -1.0}}])
    assert len(LEARNED) == 2
    monkeypatch.setattr(fits, "USERS", 7)
    world.run(out="few", compressors=["spy"], budgets=[0.3], seeds=[1])
    assert len(LEARNED) == 3, "another backbone"


@pytest.mark.parametrize("harm", ["tensors", "about", "swapped"])
def test_a_fit_that_is_not_what_was_written_is_made_again(world, spy, harm):  # noqa: F811
    _, first = rows_of(world, compressors=["spy"])
    (place,) = (world.folder / "home" / "checkpoints").glob("*/fits/spy-*")
    if harm == "tensors":
        content = bytearray((place / "fit.safetensors").read_bytes())
        content[-1] ^= 1
        (place / "fit.safetensors").write_bytes(bytes(content))
    elif harm == "about":
        (place / "fit.json").write_text((place / "fit.json").read_text().replace('"seed": 0', '"seed": 1'))
    else:
        rows_of(world, out="swap", compressors=[{"spy": {"sign": -1.0}}])
        (other,) = set(place.parent.glob("spy-*")) - {place}
        for name in ("fit.json", "fit.safetensors"):
            (place / name).write_bytes((other / name).read_bytes())
    before = len(LEARNED)
    _, again = rows_of(world, out="again", compressors=["spy"])
    assert len(LEARNED) == before + 1 and again["hashes"]["fit"] == first["hashes"]["fit"]
    assert again["values_digest"] == first["values_digest"]


def test_a_fit_that_fails_fails_its_own_cells(world, spy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(spy, "fit", lambda self, sample, budget=None: {"total": 1})
    with pytest.raises(AssertionError):
        rows_of(world, compressors=["spy", "recent"])
    rows = {row["compressor"]: row for row in read_rows(world.folder / "run" / "rows")}
    assert rows["recent"]["status"] == "ok" and rows["recent"]["bytes_fixed"] == 0
    assert rows["recent"]["fit_seconds"] is None, "it learns nothing"
    assert rows["spy"]["status"] == "failed" and "fit gave no Fitted" in rows["spy"]["reason"]


def test_who_is_in_the_sample_does_not_hang_on_who_else_is_there(synthetic):
    few, more = sampled(synthetic, 20), sampled(synthetic, 60)
    assert len(few) == 20 and set(few) <= set(more) and len(set(sampled(synthetic, 20, seed=1)) - set(few)) > 5
    found = torch.cat([ids for ids, _ in histories(synthetic, few, 64)])
    assert sorted(found.tolist()) == sorted(synthetic.dataset.user_ids[few].tolist())


def test_popularity_counts_training_events(synthetic):
    data, want = synthetic.dataset, np.zeros(synthetic.dataset.n_items, int)
    for user in range(data.n_users):
        for place in range(data.offsets[user], synthetic.train_end[user]):
            want[data.items[place] - 1] += 1
    found = facts(synthetic, Stats(popularity=True, categories=True))
    assert found["popularity"].tolist() == want.tolist()
    assert facts(synthetic, Stats(events=True)) is None


def test_even_probes_are_all_items_of_training_alike(synthetic):
    known = np.flatnonzero(facts(synthetic, Stats(popularity=True))["popularity"]) + 1
    few, all_of_them = (facts(synthetic, Stats(probes=number))["even"].tolist() for number in (8, 10**6))
    assert few == all_of_them[:8] and sorted(all_of_them) == known.tolist()
    assert all_of_them != known.tolist(), "in an order that says nothing of the catalogue's"
    drawn = facts(synthetic, Stats(probes=8))["probes"].tolist()
    assert few != drawn


def test_categories_that_a_fit_learns_from_are_in_its_identity(world, spy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(spy, "fit_needs", property(lambda self: Stats(categories=True)))
    plain = spy.fit
    monkeypatch.setattr(
        spy,
        "fit",
        lambda self, sample, budget=None: Fitted(
            {"total": plain(self, sample)["total"] + next(iter(sample)).items["categories"][:3]}
        ),
    )
    found = []
    for names in ("ABCD", "AABC", "ABCD"):
        world.categories(names)
        result, row = rows_of(world, compressors=["spy"])
        found.append((row["cell_id"], row["hashes"]["fit"], result.reused))
    assert found[0][:2] == found[2][:2] and found[2][2] == 1, "what was is served again"
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1] and len(LEARNED) == 2
