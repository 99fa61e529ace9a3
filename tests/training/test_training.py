"""Fitting: it learns, keeps the best epoch, stops, and after a kill ends with the very same weights."""

import json
import math
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.losses import _ROWS, next_item_loss, sampled_loss
from malloc_bench.data import load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.batches import training_batches, window
from malloc_bench.data.tasks.splits import Targets, get_split, leave_one_out
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.files import atomic_write, file_digest, sealed
from malloc_bench.training import checkpoints
from malloc_bench.training import fit as training
from malloc_bench.training.fit import Fit, Training, fast_bfloat16, fit, validation_ndcg

SETTINGS = Training(epochs=4, batch_size=16, lr=5e-3)


@pytest.fixture(scope="module")
def split():
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 120, "items": 100, "median": 20, "longest": 50, "shortest": 3})
    return leave_one_out(group(card, generate(small), "test"))


def fresh(split, name="sasrec", **params):
    torch.manual_seed(0)
    return get_backbone(name, split.dataset.n_items, True, **{"dim": 16, "max_length": 30, **params})


def weights(backbone):
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module", params=["sasrec", "hstu"])
def whole(request, split, tmp_path_factory):
    """An uninterrupted fit: (backbone's name, folder, Fit, weights)."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone = fresh(split, request.param)
    result = fit(backbone, split, SETTINGS, 7, folder)
    return request.param, folder, result, weights(backbone)


@pytest.fixture
def scores(monkeypatch):
    """scores(0.1, 0.3, ...) are what validation says, epoch after epoch; gives the weights that it was asked about."""

    def use(*values):
        seen = []

        def say(backbone, split, targets, filter_seen):
            seen.append(weights(backbone))
            return values[len(seen) - 1]

        monkeypatch.setattr(training, "validation_ndcg", say)
        return seen

    return use


# --- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_loss_falls_and_validation_beats_the_untrained_model(split, tmp_path, name):
    backbone, losses = fresh(split, name), {}
    before = validation_ndcg(backbone, split, split.valid)
    result = fit(
        backbone,
        split,
        Training(epochs=8, batch_size=16, lr=5e-3),
        0,
        tmp_path,
        lambda p: losses.update({p.epoch: p.loss}),
    )
    assert len(losses) == 8 and losses[7] < losses[0] - 0.2
    assert list(losses.values()) == sorted(losses.values(), reverse=True)
    assert result.best_ndcg > 1.2 * before
    assert result.best_ndcg == pytest.approx(validation_ndcg(backbone, split, split.valid), abs=1e-9)
    assert not backbone.training and result.seconds > 0


def test_a_first_loss_is_that_of_guessing(split):
    batch = next(training_batches(split, 30, 16, 0, 0))
    loss = float(fresh(split, head="dot").loss(batch).detach())
    assert loss == pytest.approx(math.log(split.dataset.n_items), rel=0.1)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_validation_ndcg_is_the_mean_over_users(split, filter_seen):
    backbone, gains = fresh(split), []
    with torch.no_grad():
        table = backbone.eval().catalogue().double()
        for user, at in zip(split.valid.users, split.valid.at):
            scores = table @ backbone(window(split.dataset, np.array([user]), np.array([at]), 30))[0, -1].double()
            target = split.dataset.items[at] - 1
            seen = split.dataset.items[split.dataset.offsets[user] : at] - 1
            if filter_seen:
                scores[seen[seen != target]] = -torch.inf
            rank = int((scores >= scores[target]).sum()) - 1
            gains.append(1 / math.log2(rank + 2) if rank < 10 else 0)
    found = validation_ndcg(backbone, split, split.valid, filter_seen=filter_seen)
    assert found == pytest.approx(np.mean(gains), abs=1e-5)
    assert validation_ndcg(backbone, split, Targets(split.valid.users[:0], split.valid.at[:0])) == 0
    some = np.linspace(0, len(gains) - 1, 10).astype(int)
    found = validation_ndcg(backbone, split, split.valid, 10, filter_seen)
    assert found == pytest.approx(np.mean(np.array(gains)[some]), abs=1e-5)


def test_training_never_looks_at_test_events(split, tmp_path):
    """Other test items, the same weights."""
    other = split.dataset.items.copy()
    other[split.test.at] = 1 + other[split.test.at] % split.dataset.n_items
    changed = leave_one_out(replace(split.dataset, items=other))
    a, b = fresh(split), fresh(split)
    settings = Training(epochs=2, batch_size=16)
    fit(a, split, settings, 0, tmp_path / "a")
    fit(b, changed, settings, 0, tmp_path / "b")
    assert_equal(weights(a), weights(b))


# --- the best epoch -------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept(split, tmp_path, scores):
    seen, backbone = scores(0.1, 0.3, 0.2, 0.3), fresh(split)
    result = fit(backbone, split, SETTINGS, 0, tmp_path)
    assert (result.epochs, result.best_epoch, result.best_ndcg) == (4, 2, 0.3)  # the earlier of two equals
    assert_equal(weights(backbone), seen[1])
    assert any(not torch.equal(seen[1][name], seen[3][name]) for name in seen[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "model.safetensors"]


@pytest.mark.parametrize(("patience", "epochs"), [(0, 3), (1, 3), (2, 4), (3, 5), (9, 6)])
def test_patience_counts_epochs_without_a_better_one(split, tmp_path, scores, patience, epochs):
    scores(0.1, 0.2, 0.1, 0.2, 0.1, 0.1)
    result = fit(fresh(split), split, Training(epochs=6, batch_size=64, patience=patience), 0, tmp_path)
    assert (result.epochs, result.best_epoch) == (epochs, 2)


def test_no_epochs_leave_the_weights_alone(split, tmp_path):
    backbone = fresh(split)
    before = weights(backbone)
    result = fit(backbone, split, Training(epochs=0), 0, tmp_path)
    assert result == Fit(0, 0, -1.0, 0.0, weights=file_digest(tmp_path / "model.safetensors"))
    assert_equal(weights(backbone), before)


def test_progress(split, tmp_path):
    steps = []
    fit(fresh(split), split, Training(epochs=2, batch_size=50), 0, tmp_path, steps.append)
    n = -(-int((split.train_end - split.dataset.offsets[:-1] > 1).sum()) // 50)
    assert [(p.epoch, p.step) for p in steps] == [(epoch, step) for epoch in (0, 1) for step in range(1, n + 1)]
    assert all((p.epochs, p.steps) == (2, n) for p in steps)
    assert [p.best is None for p in steps] == [p.epoch == 0 for p in steps]


def test_an_epoch_of_repeats_is_so_many_epochs_that_are_asked_once(split, tmp_path, monkeypatch):
    seen, steps = [], []

    def noted(*args, **kwargs):
        for batch in training_batches(*args, **kwargs):
            seen.append(batch.targets.sum().item())
            yield batch

    def run(repeats, epochs):
        again = get_split({"leave_one_out": {"repeats": repeats}}, split.dataset)
        seen.clear(), steps.clear()
        fit(fresh(again), again, Training(epochs=epochs, batch_size=50), 0, tmp_path / f"{repeats}", steps.append)
        return seen[-len(steps) :], [(p.epoch, p.step) for p in steps]  # the first were only counted

    monkeypatch.setattr(training, "training_batches", noted)
    (once, one), (twice, two) = run(1, 4), run(2, 2)
    assert once == twice and len(one) == len(two) and two[-1] == (1, len(one) // 2)


# --- kills ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_at(epoch, step=1):
    def report(progress):
        if (progress.epoch, progress.step) == (epoch, step):
            raise Killed

    return report


def interrupted(split, name, folder, epoch=1, step=3):
    with pytest.raises(Killed):
        fit(fresh(split, name), split, SETTINGS, 7, folder, kill_at(epoch, step))


def finish(split, name, folder):
    """Go on in what could be a new process: other weights, another state of the random numbers."""
    backbone = fresh(split, name)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    torch.manual_seed(99)
    epochs = []
    result = fit(backbone, split, SETTINGS, 7, folder, lambda p: epochs.append(p.epoch))
    return backbone, result, sorted(set(epochs))


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_killed_fit_ends_as_an_uninterrupted_one(split, tmp_path, whole, epoch):
    name, _, want, final = whole
    interrupted(split, name, tmp_path, epoch)
    backbone, result, epochs = finish(split, name, tmp_path)
    assert epochs == list(range(epoch, 4))
    assert_equal(weights(backbone), final)
    assert (result.epochs, result.best_epoch, result.best_ndcg) == (want.epochs, want.best_epoch, want.best_ndcg)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "model.safetensors"]


CACHED = replace(SETTINGS, window="newest")


@pytest.mark.parametrize("epoch", [1, 3])
def test_what_a_backbone_carries_is_kept_too(split, tmp_path, epoch):
    """A fit over MARM's entries goes on from those of the last whole epoch, and not without them."""
    final, losses = {}, {}
    for where, told in (("whole", None), ("killed", epoch), ("lost", epoch)):
        folder = tmp_path / where
        if told:
            with pytest.raises(Killed):
                fit(fresh(split, "marm", cached=True), split, CACHED, 7, folder, kill_at(told, 3))
        if where == "lost":
            about = json.loads((folder / "resume.json").read_text())
            file = folder / f"resume-{told}.safetensors"
            tensors = {k: torch.zeros_like(v) if k == "carried.items" else v for k, v in load_file(file).items()}
            known = {k: about[k] for k in about.keys() - {"sha256", "resume"}}
            atomic_write(folder / "resume.json", sealed({**known, "resume": checkpoints.write_tensors(file, tensors)}))
        backbone = fresh(split, "marm", cached=True)
        fit(backbone, split, CACHED, 7, folder, lambda p, where=where: losses.update({where: p.loss}))
        final[where] = weights(backbone)
        assert not any("entries" in name or "vectors" in name for name in final[where])
    assert_equal(final["killed"], final["whole"])
    assert losses["killed"] == losses["whole"] != losses["lost"]


@pytest.mark.parametrize("more", [{"window": None}, {"stochastic_length": 1.5}], ids=str)
def test_entries_are_found_at_their_places_only(split, tmp_path, more):
    with pytest.raises(
        ValueError, match=r"marm trains on what it keeps .* the retrieval task, one process, `training: .window: newest"
    ):
        fit(fresh(split, "marm", cached=True), split, replace(CACHED, **more), 7, tmp_path)


def test_killed_again_and_again(split, tmp_path, whole):
    name, _, _, final = whole
    for epoch in (1, 1, 2, 3):
        interrupted(split, name, tmp_path, epoch)
    assert_equal(weights(finish(split, name, tmp_path)[0]), final)


@pytest.mark.parametrize("tear", ["resume.json", "resume-2.safetensors", "best", "list", "gone"])
def test_a_torn_checkpoint_starts_afresh(split, tmp_path, whole, tear):
    name, _, _, final = whole
    interrupted(split, name, tmp_path, 2)
    if tear == "best":
        next(tmp_path.glob("best-*")).unlink()
    elif tear == "list":
        (tmp_path / "resume.json").write_text("[1, 2]")
    elif tear == "gone":
        (tmp_path / "resume-2.safetensors").unlink()
    else:
        torn = tmp_path / tear
        torn.write_bytes(torn.read_bytes()[:-20])
    torch.manual_seed(0)
    backbone = fresh(split, name)
    epochs = []
    fit(backbone, split, SETTINGS, 7, tmp_path, lambda p: epochs.append(p.epoch))
    assert set(epochs) == {0, 1, 2, 3}
    assert_equal(weights(backbone), final)


@pytest.mark.parametrize("whole", ["sasrec"], indirect=True)
@pytest.mark.parametrize("call", range(1, 12))
def test_killed_between_any_two_files(split, tmp_path, whole, monkeypatch, call):
    """Every write of the fit is the last one once."""
    name, _, _, final = whole
    inner, calls = checkpoints.atomic_write, []

    def dies(path, content):
        calls.append(path.name)
        if len(calls) == call:
            raise Killed
        return inner(path, content)

    monkeypatch.setattr(checkpoints, "atomic_write", dies)
    with pytest.raises(Killed):
        fit(fresh(split, name), split, SETTINGS, 7, tmp_path)
    monkeypatch.setattr(checkpoints, "atomic_write", inner)
    if call <= 3:  # nothing to go on from: the weights are those of a fresh backbone
        backbone = fresh(split, name)
        fit(backbone, split, SETTINGS, 7, tmp_path)
    else:
        backbone = finish(split, name, tmp_path)[0]
    assert_equal(weights(backbone), final)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "model.safetensors"]


@pytest.mark.parametrize("whole", ["sasrec"], indirect=True)
def test_killed_while_it_forgets_the_way_there(split, tmp_path, whole, monkeypatch):
    name, _, _, final = whole

    def dies(folder):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "_forget_the_way", dies)
        fit(fresh(split, name), split, SETTINGS, 7, tmp_path)
    assert list(tmp_path.glob("resume*")) and list(tmp_path.glob("best-*"))
    backbone = fresh(split, name)
    fit(backbone, split, SETTINGS, 7, tmp_path)
    assert_equal(weights(backbone), final)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "model.safetensors"]


def test_a_lost_epoch_leaves_no_trace(split, tmp_path, scores, monkeypatch):
    """An epoch that was killed before its checkpoint was whole is not kept as the best, though it was better."""
    first = scores(0.3, 0.5)
    inner = checkpoints.atomic_write

    def dies(path, content):
        if path.name == "resume.json" and b'"epoch": 2' in content:
            raise Killed
        inner(path, content)

    monkeypatch.setattr(checkpoints, "atomic_write", dies)
    with pytest.raises(Killed):
        fit(fresh(split), split, Training(epochs=2, batch_size=16), 7, tmp_path)
    monkeypatch.setattr(checkpoints, "atomic_write", inner)
    scores(0.2)
    backbone = fresh(split)
    result = fit(backbone, split, Training(epochs=2, batch_size=16), 7, tmp_path)
    assert (result.best_epoch, result.best_ndcg) == (1, 0.3)
    assert_equal(weights(backbone), first[0])


def test_a_finished_folder_is_only_loaded(split, whole, monkeypatch):
    name, folder, result, final = whole
    monkeypatch.setattr(training, "training_batches", lambda *args: pytest.fail("trained again"))
    backbone = fresh(split, name)
    with torch.no_grad():
        backbone.items.weight.zero_()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert fit(backbone, split, SETTINGS, 7, folder) == result and not backbone.training
    assert_equal(weights(backbone), final)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert checkpoints.finished(folder) == result


@pytest.mark.parametrize("whole", ["sasrec"], indirect=True)
@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "weights of another", "fit of another", "fit empty", "gone"])
def test_weights_that_are_not_what_was_written_are_made_again(split, tmp_path, whole, caplog, spoil):
    name, folder, result, final = whole
    mine, other = tmp_path / folder.name, tmp_path / "other"
    shutil.copytree(folder, mine)
    fit(fresh(split, name), split, replace(SETTINGS, epochs=1), 8, other)
    model, done = mine / "model.safetensors", mine / "fit.json"
    content = bytearray(model.read_bytes())
    content[-5] ^= 1
    if spoil == "flip":
        model.write_bytes(content)
    elif spoil in ("cut", "empty"):
        model.write_bytes(content[:-400] if spoil == "cut" else b"")
    elif spoil == "weights of another":
        shutil.copy(other / "model.safetensors", model)
    elif spoil == "fit of another":
        for each in other.iterdir():
            shutil.copy(each, mine)
    elif spoil == "fit empty":
        done.write_bytes(b"")
    else:
        model.unlink()
    backbone = fresh(split, name)
    again = fit(backbone, split, SETTINGS, 7, mine)
    assert len(caplog.records) == 1 and "made again" in caplog.text
    assert replace(again, seconds=0) == replace(result, seconds=0)
    assert_equal(weights(backbone), final)
    caplog.clear()
    assert fit(fresh(split, name), split, SETTINGS, 7, mine) == again and not caplog.records


@pytest.mark.parametrize("name", ["resume.json", "resume-2.safetensors", "best"])
def test_an_unfinished_fit_that_is_not_what_was_written_begins_anew(split, tmp_path, whole, caplog, name):
    part, _, _, final = whole
    interrupted(split, part, tmp_path, 2)
    path = next(tmp_path.glob("best-*")) if name == "best" else tmp_path / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 2  # a digit of the JSON's digest, or of a number
    path.write_bytes(content)
    backbone = fresh(split, part)
    fit(backbone, split, SETTINGS, 7, tmp_path)
    assert len(caplog.records) == 1 and "begins anew" in caplog.text
    assert_equal(weights(backbone), final)


def test_no_pickle_is_ever_read_or_written(split, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    interrupted(split, "sasrec", tmp_path, 2)
    finish(split, "sasrec", tmp_path)
    finish(split, "sasrec", tmp_path)
    bomb = tmp_path / "bomb"
    bomb.mkdir()
    for name in ("resume-1.safetensors", "best-1.safetensors"):
        (bomb / name).write_bytes(
            b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
        )
    known = file_digest(bomb / "best-1.safetensors")
    where = {"epoch": 1, "best_epoch": 1, "best": 0.5, "seconds": 1, "sgd_after": None, "weights": known}
    atomic_write(bomb / "resume.json", sealed({**where, "resume": known, "folder": "bomb"}))
    epochs = []
    fit(fresh(split), split, Training(epochs=1, batch_size=64), 0, bomb, lambda p: epochs.append(p.epoch))
    assert set(epochs) == {0}


# --- Adam, then SGD -------------------------------------------------------------------------------------------------

SWITCHING = Training(epochs=5, batch_size=32, lr=5e-3, patience=1, optimizer="adam_then_sgd", sgd_lr=0.3)
STALLS = (0.2, 0.1, 0.25, 0.3, 0.28)  # Adam stalls after its second epoch, SGD does not


@pytest.fixture
def steps(monkeypatch):
    """The optimizer and learning rate of every step, and the item embeddings that it starts from."""
    taken = []
    for kind in (torch.optim.AdamW, torch.optim.SGD):

        def step(self, *args, inner=kind.step, name=kind.__name__):
            group = self.param_groups[0]
            taken.append((name, group["lr"], group["params"][0].detach().clone()))
            return inner(self, *args)

        monkeypatch.setattr(kind, "step", step)
    return taken


@pytest.mark.parametrize(
    ("values", "patience", "epochs", "best", "after"),
    [
        ((0.1, 0.2, 0.3, 0.4, 0.5), 1, 5, 5, None),  # Adam never stalls
        (STALLS, 1, 5, 4, 2),
        ((0.3, 0.2, 0.1), 1, 3, 1, 2),  # SGD finds nothing better: Adam's best stays
        ((0.3, 0.2, 0.1, 0.2, 0.25), 2, 5, 1, 3),
        ((0.1, 0.2, 0.1, 0.1, 0.3), 2, 5, 5, 4),
        ((0.1, 0.2, 0.3, 0.3, 0.2), 2, 5, 3, None),  # the stall and the last epoch coincide
    ],
)
def test_sgd_takes_over_where_adam_stalls(split, tmp_path, scores, steps, values, patience, epochs, best, after):
    seen, backbone = scores(*values), fresh(split)
    settings = replace(SWITCHING, patience=patience)
    result = fit(backbone, split, settings, 0, tmp_path)
    assert (result.epochs, result.best_epoch, result.best_ndcg, result.sgd_after) == (
        epochs, best, max(values), after,
    )  # fmt: skip
    assert_equal(weights(backbone), seen[best - 1])
    n = len(steps) // epochs
    adam = n * (epochs if after is None else after)
    assert [name for name, _, _ in steps] == ["AdamW"] * adam + ["SGD"] * (len(steps) - adam)
    rates = [(5e-3 if i < adam else 0.3) * training._schedule(i / n, 5) for i in range(len(steps))]
    assert [rate for _, rate, _ in steps] == pytest.approx(rates)
    if after is not None:  # SGD goes on from the best epoch of Adam, not from the last
        at_switch = int(np.argmax(values[:after]))
        assert torch.equal(steps[adam][2], seen[at_switch]["items.weight"])
        assert not torch.equal(seen[at_switch]["items.weight"], seen[after - 1]["items.weight"])


def test_adam_alone_never_switches(split, tmp_path, scores, steps):
    scores(*STALLS)
    result = fit(fresh(split), split, replace(SWITCHING, optimizer="adam"), 0, tmp_path)
    assert (result.epochs, result.best_epoch, result.sgd_after) == (2, 1, None)
    assert {name for name, _, _ in steps} == {"AdamW"}


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])  # with Adam, at the switch, after it, with a better SGD epoch behind
def test_a_killed_fit_goes_on_with_the_optimizer_it_had(split, tmp_path, scores, steps, epoch):
    scores(*STALLS)
    whole = fresh(split)
    want = fit(whole, split, SWITCHING, 7, tmp_path / "whole")
    order = [name for name, _, _ in steps]
    scores(*STALLS)
    with pytest.raises(Killed):
        fit(fresh(split), split, SWITCHING, 7, tmp_path / "killed", kill_at(epoch, 3))
    where = json.loads((tmp_path / "killed" / "resume.json").read_text())
    assert (where["epoch"], where["sgd_after"]) == (epoch, 2 if epoch > 2 else None)
    steps.clear()
    scores(*STALLS[epoch:])
    backbone = fresh(split)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    result = fit(backbone, split, SWITCHING, 7, tmp_path / "killed")
    assert_equal(weights(backbone), weights(whole))
    assert replace(result, seconds=want.seconds) == want
    assert [name for name, _, _ in steps] == order[epoch * (len(order) // 5) :]


# --- schedule and precision -----------------------------------------------------------------------------------------


def test_the_schedule_warms_up_for_an_epoch_and_falls_to_nothing():
    rates = [training._schedule(epoch, 10) for epoch in np.linspace(0, 10, 201)]
    top = int(np.argmax(rates))
    assert 0.04 < rates[0] < 0.06 and 0.9 < max(rates) <= 1 and 0.9 <= top / 20 <= 1.0
    assert (np.diff(rates[: top + 1]) > 0).all() and (np.diff(rates[top:]) < 0).all()
    assert rates[100] == pytest.approx(0.5) and rates[-1] == pytest.approx(0)
    assert training._schedule(11, 10) == pytest.approx(0) and 0 < training._schedule(0, 1) < 0.06


def test_the_schedule_is_what_the_optimizer_gets(split, tmp_path, monkeypatch):
    rates = []
    inner = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), inner(self, *a))[1]
    )
    fit(fresh(split), split, Training(epochs=3, batch_size=32, lr=0.01), 0, tmp_path)
    steps = len(rates) // 3
    assert rates == pytest.approx([0.01 * training._schedule(i / steps, 3) for i in range(len(rates))])


@pytest.mark.parametrize(
    ("cpu", "fast"),
    [
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx avx2", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: amx_bf16 amx_tile", True),
        ("Features\t: asimd fp bf16", False),
        ("", False),
    ],
)
def test_bfloat16_is_for_cpus_that_have_it(monkeypatch, cpu, fast):
    monkeypatch.setattr(Path, "read_text", lambda self: cpu)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert fast_bfloat16(torch.device("cpu")) is fast
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert not fast_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("amp", "fast", "used"), [("auto", True, True), ("auto", False, False), ("bf16", False, True), ("off", True, False)]
)
def test_autocast_follows_the_setting_and_the_probe(split, tmp_path, monkeypatch, amp, fast, used):
    monkeypatch.setattr(training, "fast_bfloat16", lambda device: fast)
    backbone, seen = fresh(split), set()
    inner = backbone.loss
    monkeypatch.setattr(backbone, "loss", lambda batch: seen.add(torch.is_autocast_enabled("cpu")) or inner(batch))
    fit(backbone, split, Training(epochs=1, batch_size=64, amp=amp), 0, tmp_path)
    assert seen == {used}


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
@pytest.mark.parametrize("head", ["cosine", "dot"])
def test_bfloat16_gradients_are_near(split, name, head):
    """Small products may be emulated here; what counts is that training in autocast is the same to its precision."""
    backbone = fresh(split, name, head=head, dropout=0.0)
    batch = next(training_batches(split, 30, 16, 0, 0))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = backbone.loss(batch)
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(backbone.parameters()))]))
    full, half = gradients
    assert float(F.cosine_similarity(full, half, dim=0)) > 0.99 and half.dtype == torch.float32


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, _ROWS, 2 * _ROWS + 3])
@pytest.mark.parametrize("size", [0.3, 3.0, 40.0])  # below and above where exp needs the maximum taken off
def test_the_loss_is_cross_entropy(rows, size):
    generator = torch.Generator().manual_seed(rows)
    hidden = (size * torch.randn(rows, 12, generator=generator)).requires_grad_()
    table = torch.randn(50, 12, generator=generator).requires_grad_()
    targets = torch.randint(50, (rows,), generator=generator)
    got = next_item_loss(hidden, table, targets)
    want = F.cross_entropy(hidden.double() @ table.double().T, targets)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-6)
    ours = torch.autograd.grad(3 * got, (hidden, table))
    theirs = torch.autograd.grad(3 * want, (hidden, table))
    for a, b in zip(ours, theirs):
        assert float((a - b).abs().max()) <= 3e-6 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("each", [1, 49 / 30])
def test_the_sampled_loss_holds_each_target_against_the_negatives_that_are_not_it(each):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 10, 12, generator=generator).requires_grad_()
    table = torch.randn(50, 12, generator=generator).requires_grad_()
    targets = torch.randint(-1, 50, (4, 10), generator=generator)
    negatives = torch.randint(50, (4, 30), generator=generator)
    losses = []
    for row in range(4):
        assert torch.isin(targets[row], negatives[row]).any()
        for h, target in zip(hidden[row].double(), targets[row]):
            rivals = [target, *(n for n in negatives[row] if n != target)]
            if target >= 0:
                stand_for = torch.tensor([1.0, *[each] * (len(rivals) - 1)], dtype=torch.float64)
                logits = table.double()[torch.stack(rivals)] @ h + stand_for.log()
                losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
    want = torch.stack(losses).mean()
    got = sampled_loss(hidden, table, targets, negatives, each)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for a, b in zip(torch.autograd.grad(got, (hidden, table)), torch.autograd.grad(want, (hidden, table))):
        assert torch.allclose(a, b.float(), atol=1e-6)


def test_against_every_other_item_once_it_is_the_whole_softmax(split):
    backbone, batch = fresh(split).eval(), next(training_batches(split, 30, 16, 0, 0))
    everything = torch.arange(1, split.dataset.n_items + 1, dtype=torch.int32).expand(len(batch.targets), -1)
    for drawn, each in ((everything, 1.0), (everything.repeat(1, 2), 0.5)):  # twice, each standing for a half
        sampled = backbone.loss(replace(batch, negatives=drawn, each=each))
        assert float(sampled.detach()) == pytest.approx(float(backbone.loss(batch).detach()), rel=1e-5)
    told = next(training_batches(split, 30, 16, 0, 0, negatives=10, logq=True))
    assert told.each == (split.dataset.n_items - 1) / 10


@pytest.mark.parametrize("settings", [{"negatives": 20}, {"negatives": 20, "logq": True}, {"stochastic_length": 1.4}])
def test_it_learns_from_sampled_negatives_and_of_thinned_histories(split, tmp_path, settings):
    backbone = fresh(split, "hstu")
    before = validation_ndcg(backbone, split, split.valid)
    result = fit(backbone, split, Training(epochs=12, batch_size=16, lr=5e-3, **settings), 0, tmp_path)
    assert result.best_ndcg > 1.1 * before


# --- the published protocol -----------------------------------------------------------------------------------------


def test_without_validation_all_epochs_are_run_and_the_last_is_kept(split, tmp_path):
    published = get_split({"leave_one_out": {"protocol": "published"}}, split.dataset)
    backbone = fresh(split)
    result = fit(backbone, published, replace(SETTINGS, patience=1), 7, tmp_path)
    assert (result.epochs, result.best_epoch, result.best_ndcg, result.best_auc) == (4, 4, None, None)
    assert checkpoints.finished(tmp_path) == result
    last = fresh(split)
    last.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_equal(weights(backbone), weights(last))


def test_an_interrupted_fit_without_validation_goes_on(split, tmp_path):
    published = get_split({"leave_one_out": {"protocol": "published"}}, split.dataset)
    whole, parts = fresh(split), fresh(split)
    fit(whole, published, SETTINGS, 7, tmp_path / "whole")

    def stop(progress):
        if (progress.epoch, progress.step) == (2, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parts, published, SETTINGS, 7, tmp_path / "parts", stop)
    parts = fresh(split)
    assert fit(parts, published, SETTINGS, 7, tmp_path / "parts").epochs == 4
    assert_equal(weights(whole), weights(parts))


def test_sgd_cannot_take_over_where_nothing_validates(split, tmp_path):
    published = get_split({"leave_one_out": {"protocol": "published"}}, split.dataset)
    with pytest.raises(ValueError, match="nothing validates"):
        fit(fresh(split), published, Training(epochs=1, optimizer="adam_then_sgd"), 0, tmp_path)


def test_both_ways_to_the_loss_were_tried():
    bound = [
        float(size * torch.randn(300, 12).norm(dim=1).max() * torch.randn(50, 12).norm(dim=1).max())
        for size in (0.3, 40.0)
    ]
    assert bound[0] < 60 < bound[1]


def test_a_batch_without_targets_costs_nothing():
    hidden, table = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = next_item_loss(hidden, table, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0 and not table.grad.any()


def test_what_is_freed_stays_with_the_process_after_tuning_malloc():
    """Beyond 2 GB too: a page that is given back is faulted in again by the next method."""
    code = """
import os, torch
from malloc_bench.run.executors.page import memory_of
from malloc_bench.training.fit import tune_malloc
tune_malloc()
x = [torch.ones(256 << 20) for _ in range(3)]
while x:
    x.pop()
print(memory_of(os.getpid()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 3 << 30


def test_tuning_malloc_is_harmless():
    training.tune_malloc()
    assert float(torch.ones(1 << 20).sum()) == 1 << 20
