"""The prepared cache: keyed by content, sealed against damage, and clear of what killed processes leave."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time

import pytest

from malloc_bench import files
from malloc_bench.data import get_dataset


@pytest.fixture
def toy(make_card, tmp_path, monkeypatch, udata):
    """A card of one local file, which is there."""
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "u.data").write_bytes(udata)
    return make_card(sources=[{"local": "u.data"}])


def prepared(tmp_path):
    return sorted((tmp_path / "home" / "prepared").iterdir())


def test_other_content_of_equal_size_and_time_is_other_data(toy, tmp_path, udata):
    path = tmp_path / "mine" / "u.data"
    state = path.stat()
    first = get_dataset(toy)
    path.write_bytes(udata.replace(b"300", b"301"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    second = get_dataset(toy)
    assert (first.times.max(), second.times.max()) == (300, 301) and first.hash != second.hash
    path.write_bytes(udata)
    assert get_dataset(toy).hash == first.hash and len(prepared(tmp_path)) == 2


def test_equal_content_elsewhere_in_time_is_not_prepared_again(toy, tmp_path, monkeypatch):
    first = get_dataset(toy)
    os.utime(tmp_path / "mine" / "u.data", (1, 1))
    monkeypatch.setattr("malloc_bench.data.prepare.prepare", None)
    assert get_dataset(toy).hash == first.hash


def test_no_damage_to_about_is_believed(toy, tmp_path, caplog):
    first = get_dataset(toy)
    [folder] = prepared(tmp_path)
    about = folder / "about.json"
    good, rng = about.read_bytes(), random.Random(0)
    flips = [(rng.randrange(len(good)), 1 << rng.randrange(8)) for _ in range(12)]
    bad = [good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :] for at, bit in flips]
    bad += [good[:-9], b"", b"{}", b"[]", b"null", good + b"x", good.replace(b'"notes": {}', b'"notes": {"x": 1}')]
    for each in bad:
        about.write_bytes(each)
        caplog.clear()
        again = get_dataset(toy)
        assert (again.hash, again.notes) == (first.hash, {}), each
        [line] = [record for record in caplog.records if record.name == "malloc_bench.data.load"]
        assert "is damaged and will be made again" in line.getMessage()
        assert about.read_bytes() == good


def test_the_prepared_folder_of_another_is_not_believed(toy, tmp_path, udata, caplog):
    first = get_dataset(toy)
    [folder] = prepared(tmp_path)
    (tmp_path / "mine" / "u.data").write_bytes(udata.replace(b"300", b"3000"))
    get_dataset(toy)
    [other] = set(prepared(tmp_path)) - {folder}
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    (tmp_path / "mine" / "u.data").write_bytes(udata)
    assert get_dataset(toy).hash == first.hash and "about.json is of another folder" in caplog.text


@pytest.mark.parametrize("there", [True, False], ids=["read", "made"])
def test_what_dead_processes_leave_is_removed(there, toy, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    get_dataset(toy)
    [folder] = prepared(tmp_path)

    def leave(name, age=0.0):
        part = folder.with_name(f"{name}.part")
        part.mkdir()
        (part / "events.parquet").write_bytes(b"x")
        os.utime(part, (time.time() - age,) * 2)
        return part

    gone = [leave(f"{folder.name}.{host}-{dead.pid}-00"), leave(f"{folder.name}.elsewhere-1-00", 2 * 86400)]
    gone.append(leave(f"{folder.name}.abcd1234", 2 * 86400))  # as an older version named it
    kept = [leave(f"{folder.name}.{host}-{os.getpid()}-00", 2 * 86400), leave(f"{folder.name}.elsewhere-1-01")]
    kept.append(leave(f"another-target.{host}-{dead.pid}-00"))
    if not there:
        shutil.rmtree(folder)
    get_dataset(toy)
    assert prepared(tmp_path) == sorted([folder, *kept]) and not any(part.exists() for part in gone)


def test_a_file_left_half_written_is_removed_when_it_is_written_again(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"a[1].zip.{socket.gethostname()}-{dead.pid}-00.part"
    left.write_bytes(b"half")
    with files.whole_file(tmp_path / "a[1].zip") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].zip"]
