"""Examples run as a user types them, and show what they say they show."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget
from malloc_bench.data.tasks.batches import window
from malloc_bench.results import read_rows
from malloc_bench.run.runner import run_suite
from malloc_bench.state import Ask, Fitted
from malloc_bench.testing.worlds import World

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_fitted():
    done = subprocess.run([sys.executable, EXAMPLES / "fitted.py"], capture_output=True, text=True, check=True)
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[1:]]
    wrong = {(name, budget): float(error.rstrip("%")) for name, budget, _, error in rows}
    assert all(float(size.rstrip("%")) <= float(budget.rstrip("%")) for _, budget, size, _ in rows)
    for budget in ("12.5%", "3.1%"):
        least = min(error for (_, at), error in wrong.items() if at == budget)
        assert wrong["fit_omp + mxint", budget] == least < 20 < wrong["recent", budget]


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def why():
    return module("why")


def test_why_says_how_much_depends_on_who_reads(why):
    """Where queries are nothing a constant is all; where they are large it is not, and slots and lines explain more."""
    found = {}
    for size in (0.0, 1.0):
        torch.manual_seed(0)
        backbone = get_backbone("sasrec", 200, False, layers=2, heads=2, dim=16, max_length=64).eval()
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                parameter.normal_(std=0.4)
                if name.endswith("qkv.weight") or name.endswith("qkv.bias"):
                    parameter[:16] *= size
            prefill = World("sasrec", backbone).prefill(why.NEEDS, (20, 30))
            found[size] = dict(zip(why.COLUMNS, why.layer(prefill, 0).mean(0).tolist()))
    assert found[0.0]["constant"] == pytest.approx(1, abs=1e-6) and found[0.0]["own"] == pytest.approx(1 / 26, rel=0.05)
    assert found[1.0]["constant"] < found[1.0]["rank 1"] < found[1.0]["rank 4"] < 1
    assert found[1.0]["4 slots"] < found[1.0]["8 slots"] < 1 < 1.5 < found[1.0]["rank of A"]


def test_why_asks_for_what_is_not_trained(why, monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["why.py", "smoke"])
    with pytest.raises(SystemExit, match="is not trained yet: malloc-bench run smoke --only seed=0"):
        why.main()


TINY = """
name: tiny
datasets: [synthetic]
tasks: [retrieval]
split: leave_one_out
backbones:
  - sasrec: {layers: 1, dim: 8, max_length: 20}
compressors: [full, none, recent]
budgets: [0.25]
seeds: [0]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""


def test_where_says_for_whom_by_hand(synthetic, tmp_path, monkeypatch, capsys):
    where = module("where")
    data, targets = synthetic.dataset, synthetic.test
    trained = [x for u in range(data.n_users) for x in data.items[data.offsets[u] : synthetic.train_end[u]].tolist()]
    known = where.users(synthetic).to_dicts()
    for name, items in (("reader", data.items[targets.at - 1]), ("target", data.items[targets.at])):
        seen = [trained.count(item) for item in items.tolist()]
        low, high = np.quantile(seen, [1 / 3, 2 / 3])
        assert [row[name] for row in known] == [0 if x <= low else 1 if x <= high else 2 for x in seen]
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    run_suite(tmp_path / "tiny.yaml", tmp_path / "run", quiet=True)
    monkeypatch.setattr(sys, "argv", ["where.py", str(tmp_path / "run"), "--budget", "1/4"])
    where.main()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in table[2:]] == ["none", "recent"]
    row = next(row for row in read_rows(tmp_path / "run" / "rows") if row["compressor"] == "recent")
    kept = dict(pl.read_parquet(tmp_path / "run" / row["per_user"], columns=["user", "overlap"]).iter_rows())
    means = [np.mean([kept[each["user"]] for each in known if each["reader"] == third]) for third in range(3)]
    assert table[3][2] == f"{row['overlap@10']:.3f}" and table[3][4] == " / ".join(f"{x:.3f}" for x in means)
    monkeypatch.setattr(sys, "argv", ["where.py", str(tmp_path / "run"), "--budget", "1/3"])
    with pytest.raises(SystemExit, match="no row of seed 0 at 1/3"):
        where.main()


def test_lengths_say_how_many_slots_by_hand(tmp_path, monkeypatch, capsys):
    lengths = module("lengths")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("budgets: [0.25]", "budgets: [{slots: 2}, {slots: 8}]"))
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    run_suite(tmp_path / "tiny.yaml", tmp_path / "run", quiet=True)
    monkeypatch.setattr(sys, "argv", ["lengths.py", str(tmp_path / "run"), "--edges", "10", "--enough", "1"])
    lengths.main()
    table = capsys.readouterr().out.split("| slots that keep")[0]
    printed = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    known = {tuple(row[:2]): row[2:] for row in printed if len(row) > 2}
    for row in read_rows(tmp_path / "run" / "rows"):
        own = pl.read_parquet(tmp_path / "run" / row["per_user"]).with_columns(pl.col("length") + 1)
        groups = (own.filter((pl.col("length") < 10) == short)["overlap"] for short in (True, False))
        slots = "" if row["budget"] is None else str(json.loads(row["budget"])["slots"])
        assert known[row["compressor"], slots] == [f"{x.mean():.3f}" for x in groups if len(x)]
    assert lengths.needed([(2, 0.5), (8, 0.9)], 0.7) == "4" and lengths.needed([(2, 0.5), (8, 0.9)], 0.95) == "above 8"
    assert lengths.needed([(2, 0.5), (8, 0.9)], 0.5) == "2 or fewer"
    (tmp_path / "run" / row["per_user"]).unlink()
    with pytest.raises(SystemExit, match=r"parquet: the values by user of a row cannot be read"):
        lengths.main()
    monkeypatch.setattr(sys, "argv", ["lengths.py", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="holds no results"):
        lengths.main()


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_lengths_say_that_a_run_has_no_budgets_in_slots(task, tmp_path, monkeypatch):
    lengths = module("lengths")
    split, budgets = ("leave_one_out", "[0.25, {bytes: 400}]") if task == "retrieval" else ("ratio", "[{slots: 2}]")
    suite = TINY.replace("[0.25]", budgets).replace("retrieval", task).replace("leave_one_out", split)
    (tmp_path / "tiny.yaml").write_text(suite)
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    run_suite(tmp_path / "tiny.yaml", tmp_path / "run", quiet=True)
    assert {row["status"] for row in read_rows(tmp_path / "run" / "rows")} == {"ok"}
    monkeypatch.setattr(sys, "argv", ["lengths.py", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="no values by user of rows with budgets in slots"):
        lengths.main()


def test_later_keeps_a_tenth_from_the_fit(synthetic, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    later = module("later")
    monkeypatch.setattr(later, "PROBES", 16)
    monkeypatch.setattr(later, "READERS", 4)
    data = synthetic.dataset
    places = [x for u in range(data.n_users) for x in range(data.offsets[u], synthetic.train_end[u])]
    first, count = {}, {}
    for place in sorted(places, key=lambda x: data.times[x], reverse=True):
        item = int(data.items[place])
        first[item], count[item] = data.times[place], count.get(item, 0) + 1
    tenths = later.tenths(synthetic)
    for name, told, oldest in (("newest", first, True), ("rarest", count, False)):
        inside, outside = ([told[x] for x in told if (x in tenths[name]) == side] for side in (True, False))
        assert len(tenths[name]) == len(told) // 10
        assert min(inside) >= max(outside) if oldest else max(inside) <= min(outside)
    methods, lots = later.fits(synthetic, tenths["rarest"])
    probes = {name: set(method.needs.asks[0].which) for name, method in methods.items()}
    late = set(tenths["rarest"].tolist())
    assert not (probes["of the others"] | probes["by events"]) & late and probes["of all"] & late
    for name, lot in lots.items():
        assert ("tenth" in name) == (set(lot.tolist()) <= late)
        assert "readers" not in name or not any(each & set(lot.tolist()) for each in probes.values())
    torch.manual_seed(0)
    backbone = get_backbone("sasrec", data.n_items, data.has_time, layers=1, dim=16, max_length=40).eval()
    with torch.no_grad():
        for budget, least in ((Budget(1.0), 1.0), (Budget(slots=2), 0.0)):
            for _, found in later.overlaps(backbone, synthetic, methods, lots, budget, 40):
                assert found.keys() == lots.keys() and all(least <= float(x.mean()) <= 1 for x in found.values())


@pytest.mark.slow
def test_choices_are_judged_on_users_that_they_were_not_learnt_from(synthetic, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    choices = importlib.import_module("choices")
    dice = torch.Generator().manual_seed(0)
    told, luck = torch.arange(300.0), torch.rand(4, 300, generator=dice)
    two = torch.stack([torch.full((300,), 0.9), torch.where(told < 100, 1.0, 0.7)])
    assert choices.by_thirds(told, two) == pytest.approx(0.1 / 3, abs=0.003)
    assert choices.by_thirds(told[torch.randperm(300, generator=dice)], two) < 0.005
    assert choices.by_thirds(told, luck) < 0.01 < luck.amax(0).mean() - luck.mean(1).max()
    for name, value in {
        "FIT": {"probes": 8, "which": "top"},
        "TESTS": 4,
        "PROBES": Ask(12, "top"),
        "BUDGETS": {"all": 1.0, "1/16": 1 / 16},
    }.items():
        monkeypatch.setattr(choices, name, value)
    torch.manual_seed(0)
    data = synthetic.dataset
    backbone = get_backbone("sasrec", data.n_items, data.has_time, layers=2, dim=16, max_length=40).eval()
    with torch.no_grad():
        for methods in choices.plans().values():
            known, (whole, part), gaps = choices.judged(backbone, synthetic, methods, 30)
            assert known.keys() == {"length", "rank"} and all(x.shape == (30,) for x in known.values())
            assert (whole == 1).all() and float(gaps[0].max()) < 1e-9, "nothing is lost of what is kept whole"
            assert part.shape == (len(methods), 30) and 0 < float(part.mean()) < 1 and float(gaps[1].min()) > 0
    most = methods["90% below"]
    state = most.compress(World("any", backbone).prefill(most.needs), Budget(1 / 16), Fitted({}))
    below, above = (int(segment.slots.count.sum()) for (segment,) in state.layers)
    assert below > 3 * above


def test_the_page_on_fitted_states_is_what_the_rows_say():
    subprocess.run([sys.executable, EXAMPLES.parent / "docs" / "fitted.py", "--check"], check=True)


def test_predicted_bits_are_those_of_each_event_alone(synthetic, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    predicted = importlib.import_module("predicted")
    data = synthetic.dataset
    torch.manual_seed(0)
    backbone = get_backbone("sasrec", data.n_items, data.has_time, layers=1, dim=16, max_length=40).eval()
    common, rows = predicted.popularity(synthetic), np.arange(6)
    assert float((2**-common).sum()) == pytest.approx(1)
    with torch.no_grad():
        found = predicted.bits(backbone, synthetic, rows)
        for row, (count, by_all, by_model, target, by_all_target) in zip(rows, found.tolist()):
            user, at = synthetic.test.users[row : row + 1], synthetic.test.at[row : row + 1]
            items = torch.from_numpy(data.items[data.offsets[user[0]] : at[0] + 1].astype(np.int64) - 1)[-41:]
            own = [float(common[items[0]])]
            for place in range(int(at[0]) - len(items) + 2, int(at[0]) + 1):  # each of the others, from those before
                before = window(data, user, np.array([place]), len(items) - 1 - (int(at[0]) - place))
                scores = backbone(before)[0, int(before.count[0]) - 1] @ backbone.catalogue().mT * backbone.logit_scale
                own.append(-float(scores.log_softmax(-1)[data.items[place] - 1]) / np.log(2))
            assert count == len(items) - 1 and own.pop() == pytest.approx(target, rel=1e-4)
            assert by_model == pytest.approx(np.mean(own), rel=1e-4)
            assert by_all == pytest.approx(float(common[items[:-1]].mean()))
            assert by_all_target == pytest.approx(float(common[items[-1]]))
