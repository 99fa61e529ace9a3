"""Laws are found where they are true, and not claimed where they are not."""

import numpy as np
import polars as pl
import pytest

from malloc_bench.cli import main
from malloc_bench.registry import UnknownName
from malloc_bench.report.laws import drawn, fitted, told
from malloc_bench.report.laws.equal import equal
from malloc_bench.report.laws.forms import JOINT, LINE, PLANE, POWER, PURE, SATURATING
from malloc_bench.report.laws.judged import Points, judged
from malloc_bench.results import frame, write_row

SIZES = np.geomspace(1e5, 1e8, 7)


def power(x):
    return 4.9 + (6.8e5 / x) ** 0.121  # LSRM's constants (arXiv 2311.11351)


def seeds(x, y, noise=0.002):
    x = np.repeat(x, 3)
    return x[:, None], np.repeat(y, 3) * np.exp(np.random.default_rng(0).normal(0, noise, len(x)))


@pytest.mark.parametrize(
    "form, theta, x",
    [
        (POWER, [4.9, np.log(6.8e5), 0.121], SIZES[:, None]),
        (POWER, [0.02, np.log(30.0), 0.7], np.geomspace(100, 1e5, 6)[:, None]),
        (PURE, [np.log(20.0), 0.8], np.geomspace(100, 1e5, 6)[:, None]),
        (SATURATING, [0.05, 0.6, np.log(2000.0)], np.geomspace(100, 1e5, 8)[:, None]),
        (LINE, [1.5, 0.1], np.geomspace(100, 1e4, 6)[:, None]),
        (JOINT, [1.0, np.log(2e4), 0.3, np.log(1e3), 0.4],
         np.stack(np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e4, 1e6, 4)), -1).reshape(-1, 2)),
    ],
)  # fmt: skip
def test_a_form_finds_its_own_parameters(form, theta, x):
    y = form.predict(np.array(theta), x)
    found = form.fit(x, y)
    np.testing.assert_allclose(form.predict(found, x), y, rtol=1e-4)
    np.testing.assert_allclose(found, theta, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "form, theta, d", [(POWER, [0.5, 3.0, 0.4], 1), (PURE, [3.0, 0.4], 1), (SATURATING, [0.2, 0.7, 2.0], 1),
                       (LINE, [1.5, 0.1], 1), (JOINT, [0.5, 3.0, 0.4, 2.0, 0.8], 2), (PLANE, [2.0, 0.1, 0.2], 2)],
)  # fmt: skip
def test_slopes_are_those_of_what_is_predicted(form, theta, d):
    x, theta = np.random.default_rng(0).uniform(1, 50, (7, d)), np.array(theta)
    steps = 1e-6 * np.eye(len(theta))
    near = [(form.predict(theta + step, x) - form.predict(theta - step, x)) / 2e-6 for step in steps]
    np.testing.assert_allclose(form.slopes(theta, x), np.stack(near, 1), rtol=1e-5, atol=1e-7)


def test_a_power_law_predicts_what_was_held_out_and_nothing_held_out_is_fitted():
    x, y = seeds(SIZES, power(SIZES))
    best, *others = judged(Points.of(x, y), bootstraps=60)
    assert best.form is POWER and best.holds and best.error < best.same / 3 and best.error < best.line / 3
    low, high = best.intervals[2]
    assert low < 0.121 < high
    spoilt = np.where(x[:, 0] >= SIZES[-2], y * 2, y)  # what is held out says another thing
    held = judged(Points.of(x, spoilt), bootstraps=0)
    assert {each.form.name for each in held} == {each.form.name for each in (best, *others)}
    for each in held:
        again = next(one for one in (best, *others) if one.form is each.form)
        assert abs(each.error - again.error) > 0.6  # it was predicted as before: off by log 2


@pytest.mark.parametrize("y", [pytest.param(np.full(7, 3.0), marks=pytest.mark.slow), 3 - 0.1 * np.log(SIZES)])
def test_no_law_is_claimed_of_a_level_or_of_a_line(y):
    x, y = seeds(SIZES, y, 0.004)
    assert not any(each.holds for each in judged(Points.of(x, y), bootstraps=60) if each is not None)


def test_so_many_of_the_largest_are_held_out():
    x = np.geomspace(1, 64, 7)
    for sizes, hold, held in ((7, None, 2), (6, None, 1), (7, 3, 3)):
        points = Points.of(x[:sizes, None], np.ones(sizes), hold)
        assert points.held.tolist() == [False] * (sizes - held) + [True] * held
    with pytest.raises(ValueError, match="1 sizes are left to fit beside those held out; a law needs 3 or more"):
        judged(Points.of(x[:2, None], np.ones(2)))


def rows_of_sizes(row, losses=power, **values):
    """One `full` row a size and seed, and one of another method that no law of size may count."""
    found = []
    for size in SIZES:
        for seed in range(3):
            about = {
                "suite": f"s{size:.0f}",
                "backbone": "lsrm",
                "backbone_params": {"dim": int(size)},
                "seed": seed,
            } | values
            known = {"params": int(size) + 500, "params_embedding": 500, "loss": losses(size) + seed * 1e-3}
            found.append(row(compressor="full", family="baseline", **about, **known, **{"ndcg@10": 0.1}))
    return [*found, row(compressor="recent", family="windowing", budget=0.5, params=10**6, loss=99.0)]


def test_the_law_of_size_is_of_full_rows_by_parameters_beside_the_embeddings(row):
    (found,) = fitted(frame(rows_of_sizes(row)), "model", bootstraps=5)
    np.testing.assert_allclose(np.unique(found.points.x[:, 0]), SIZES.round(), rtol=1e-4)
    assert found.metric == "loss" and found.group == "ml-1m · retrieval · leave_one_out · lsrm"
    assert found.forms[0].form is POWER
    assert drawn("model", [found]) is not None and "power: E + (x0 / x)^a" in told("model", [found])
    (by_ndcg,) = fitted(frame(rows_of_sizes(row)), "model", "ndcg@10", bootstraps=0)
    np.testing.assert_allclose(by_ndcg.points.y, 0.9)
    (untested,) = fitted(frame(rows_of_sizes(row)), "model", bootstraps=0)
    assert "not tested: no bootstraps" in (said := told("model", [untested])) and "none: " not in said


def test_ways_of_training_are_no_sizes(row):
    """Parameters that are words or yes and no tell kinds of a backbone apart; numbers do not."""
    rows = []
    for kind in (True, False):
        for one in rows_of_sizes(row, lambda n, kind=kind: power(n) + kind):
            rows.append(one | {"backbone_params": {**(one["backbone_params"] or {}), "cached": kind}})
    found = fitted(frame(rows), "model", bootstraps=0)
    assert [each.group.split(" · ")[-1] for each in found] == ["lsrm(cached=false)", "lsrm(cached=true)"]
    assert found[1].points.y.min() > found[0].points.y.min() + 0.9


def test_rows_of_two_trainings_are_two_groups_as_in_every_table(row):
    rows = []
    for epochs, more in ((1, 1.0), (3, 0.0)):
        for one in rows_of_sizes(row, lambda n, more=more: power(n) + more):
            rows.append(one | {"cell": {"training": {"epochs": epochs}, "size": one["backbone_params"]}})
    found = fitted(frame(rows), "model", bootstraps=0)
    assert [each.group.split("lsrm")[-1] for each in found] == [" [training.epochs=1]", " [training.epochs=3]"]
    assert found[0].points.y.min() > found[1].points.y.min() + 0.9


@pytest.mark.slow
def test_the_law_of_compression_is_of_each_method_and_backbone(row):
    rows = []
    for name, lost in (("recent", lambda b: 1.5 - 0.12 * np.log(b)), ("fit_omp", lambda b: (20 / b) ** 0.7)):
        for budget in (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128):
            size = 1e5 * budget
            rows.append(
                row(compressor=name, family="any", budget=budget, bytes_mean=size, share_at_floor=0.0)
                | {"overlap@10": 1 - lost(size)}
            )
    rows.append(rows[0] | row(compressor="recent", budget=0.9, bytes_mean=9e4, share_at_floor=0.5))
    forms = {
        each.group.split(" · ")[-1]: each.forms[0].form for each in fitted(frame(rows), "compression", bootstraps=0)
    }
    assert forms == {"recent": LINE, "fit_omp": PURE}
    (alone,) = fitted(frame(rows), "compression", bootstraps=0, narrowed={"compressor": ["fit_omp"]})
    assert len(alone.points.y) == 6


def test_what_cannot_be_fitted_says_why(row):
    rows = frame(rows_of_sizes(row))
    with pytest.raises(UnknownName, match="no law is named 'modle'"):
        fitted(rows, "modle")
    with pytest.raises(UnknownName, match="no column is named 'los'"):
        fitted(rows, "model", "los")
    with pytest.raises(ValueError, match=r"no row says its training events .* run the suite again with this version"):
        fitted(rows, "data")
    with pytest.raises(ValueError, match="dataset=ml-20m: no row has it"):
        fitted(rows, "model", narrowed={"dataset": ["ml-20m"]})
    lossless = rows.with_columns(pl.lit(0.0).alias("loss"))
    (found,) = fitted(lossless, "model", bootstraps=0)
    assert not found.forms and "short of the best" in found.why and "short of the best" in told("model", [found])


def test_the_command_writes_a_page_and_a_figure(tmp_path, capsys, row):
    for each in rows_of_sizes(row):
        write_row(tmp_path / "rows", each)
    assert main(["fit", str(tmp_path), "--law", "model", "--bootstraps", "3"]) == 0
    said, told_on_the_way = capsys.readouterr()
    assert "fitted 1 of 1\n" in told_on_the_way
    assert "a law in" in said and (tmp_path / "law-model.md").read_text().startswith("# The law `model`: loss over")
    assert (tmp_path / "figures" / "law-model.png").stat().st_size > 1000
    asked, replaced = ["fit", str(tmp_path), "--law", "model", "--bootstraps"], "law-model.md (replaced: what was there"
    assert main([*asked, "3"]) == 0 and replaced not in capsys.readouterr().out  # it is the same
    assert main([*asked, "4"]) == 0 and replaced in capsys.readouterr().out
    page = (tmp_path / "law-model.md").read_bytes()
    assert main([*asked, "3", "--metric", "ndcg@10"]) == 0 and (tmp_path / "law-model-ndcg@10.md").exists()
    capsys.readouterr()
    for options, why in (
        (["--hold", "99"], "no law could be fitted (ml-1m · retrieval · leave_one_out · lsrm: 0 sizes are left"),
        (["--metric", "gauc"], "lsrm: no row has gauc): another --metric or --only, or a smaller --hold"),
        (["--metric", "compressor"], "--metric compressor: is no measure of accuracy or fidelity; expected hr@5, "),
        (["--metric", "slices"], "--metric slices: is no measure"),
    ):
        assert main(["fit", str(tmp_path), "--law", "model", *options]) == 2
        assert why in capsys.readouterr().err and (tmp_path / "law-model.md").read_bytes() == page
    assert main(["fit", str(tmp_path), "--law", "dat"]) == 2
    assert "no law is named 'dat'; there are model, data, cache, flops, compression" in capsys.readouterr().err


def test_backbones_stand_side_by_side_at_equal_flops(row):
    """Shapes within a doubling of FLOPs, each the mean of its seeds; what has no shape there has no row."""
    rows = []
    for backbone, gain in (("sasrec", 0.0), ("climber", 0.01)):
        for n, layers, flops, auc in (
            (50, 1, 1e6, 0.70),
            (25, 2, 1.1e6, 0.72),
            (100, 1, 2.1e6, 0.73),
            (50, 2, 9e6, 0.75),
        ):
            for seed in (0, 1):
                params = {"dim": 32, "max_length": n, "layers": layers}
                about = {"compressor": "full", "backbone": backbone, "backbone_params": params, "seed": seed}
                longest = {"prefill_flops_long": int(flops)} if n > 25 else {}
                cost = {
                    "prefill_flops": int(flops) if n == 25 else 7,
                    "read_flops": 1000,
                    **longest,
                    "auc": auc + gain + 0.002 * seed,
                }
                rows.append(row(**about, **cost))
    found = equal(fitted(frame(rows[:-2]), "flops", bootstraps=0))
    assert found["cost"].to_list() == ["0.524 to 1.05"] * 2 + ["1.05 to 2.1"] * 2 + ["2.1 to 4.19"] * 2 + [
        "8.39 to 16.8"
    ]
    assert found["group"][-1].endswith("sasrec")
    first = found.row(1, named=True)
    assert first["shapes"] == 1 and first["shape"] == "layers 1, max_length 50"
    assert first["mean"] == pytest.approx(0.701) == first["highest"]
    assert "## At equal FLOPs" in told("flops", fitted(frame(rows), "flops", bootstraps=0))
