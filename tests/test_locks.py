"""The locks hold the versions of the constraints, with hashes, and the wheel is the same whenever it is built."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pinned(path):
    """Name -> version of every package, and the hashes of each."""
    found = {}
    for entry in re.findall(r"^[^\s#].*(?:\n[ \t]+.*)*", path.read_text(), re.MULTILINE):
        name, version = re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", entry).groups()
        found[re.sub(r"[-_.]+", "-", name).lower()] = version, re.findall(r"sha256:([0-9a-f]{64})", entry)
    return found


def test_every_package_of_a_lock_has_hashes_and_the_version_that_is_installed():
    constraints = {name: version for name, (version, _) in pinned(ROOT / "constraints.txt").items()}
    locks = {name: pinned(ROOT / "lock" / f"{name}.txt") for name in ("all", "cpu", "cuda")}
    for lock in locks.values():
        assert all(hashes for _, hashes in lock.values())
        for name, (version, _) in lock.items():
            assert constraints.get(name, version) == version, name
    assert set(constraints) <= {name for lock in locks.values() for name in lock}
    assert set(locks["cpu"]) == {"torch"} and "torch" in locks["cuda"] and "torch" not in locks["all"]
    assert not set(locks["cpu"]["torch"][1]) & set(locks["cuda"]["torch"][1])


@pytest.mark.slow  # it fetches what builds it
def test_the_wheel_is_the_same_bit_for_bit(tmp_path):
    digests = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / name, ROOT]
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"})
        (path,) = (tmp_path / name).glob("*.whl")
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
