"""A run that is looked into: the weights are those that its rows were made with."""

from __future__ import annotations

import shutil

import pytest

from malloc_bench import load_run
from malloc_bench.data import DataError
from tests.run.test_identity import World, world  # noqa: F401


def test_weights_of_another_training_do_not_stand_for_those_of_a_row(world: World) -> None:  # noqa: F811
    world.run(compressors=["recent"], budgets=[0.3])
    run = load_run(world.folder / "run")
    assert len(run.states({"compressor": "recent"}).state) == 32
    shutil.rmtree(world.folder / "run" / "checkpoints")  # as a run is committed
    assert len(run.states({"compressor": "recent"}).state) == 32, "the cache has them too"
    world.home("other")  # another machine, which trains otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("malloc_bench.run.models.torch.manual_seed", lambda seed: None)
        world.run(out="elsewhere")
    assert load_run(world.folder / "elsewhere").backbone({"compressor": "full"})
    for look in (run.states, run.backbone, run.explained):
        with pytest.raises(FileNotFoundError, match=r"no weights that its row was made with, [0-9a-f]{8}, of sasrec"):
            look({"compressor": "recent"})


def test_data_that_changed_since_do_not_stand_for_those_of_a_row(world: World) -> None:  # noqa: F811
    world.run(compressors=["recent"], budgets=[0.3])
    world.card(on_bad={"ties": "by_item"})
    for look in (load_run(world.folder / "run").states, load_run(world.folder / "run").backbone):
        with pytest.raises(
            DataError, match=r"^toy: not the data of this row, their (hash|on_bad) was .*: put the file or"
        ):
            look({"compressor": "recent"})
