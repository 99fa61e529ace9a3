import json
import os
import subprocess
from pathlib import Path

import torch

from malloc_bench.measure import environment, load
from malloc_bench.measure.environment import _git

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_recorded_is_plain_json():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "polars", "malloc_bench", "git_commit", "cpu", "os", "hostname", "gpu"} <= found.keys()
    assert found["cores_usable"] <= found["cores"] and found["memory_bytes"] > 2**28
    assert found["threads"] == torch.get_num_threads()
    assert load() >= 0


def test_thread_settings_are_recorded_as_they_are(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    variables = environment()["variables"]
    assert variables["OMP_NUM_THREADS"] == "1" and "MKL_NUM_THREADS" not in variables


def git(folder, *words):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *words], check=True, capture_output=True
    )


def test_a_checkout_has_a_commit_and_says_when_it_is_dirty(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    commit, dirty = _git(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "a").write_text("2")
    assert _git(tmp_path) == (commit, True)


def test_somebody_elses_checkout_is_not_ours(tmp_path):
    git(tmp_path, "init")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert _git(inside) == (None, None)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _git(ROOT) == (None, None)


def test_nothing_in_a_checkout_is_written_or_locked(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    index = tmp_path / ".git" / "index"
    os.utime(tmp_path / "a", (1, 1))  # looks changed, and is not: git would note that
    before = index.read_bytes(), index.stat().st_mtime_ns
    assert _git(tmp_path)[1] is False
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before
