"""Where files come from: archives with several parts, hashes of files in them, downloads that nobody vouches for."""

import gzip
import hashlib
import io
import logging
import tarfile

import pytest

from malloc_bench.data import DataError, get_dataset, verify

PARTS = {"top/data/a.csv": b"1\t10\t5\t300\n2\t20\t3\t100\n", "top/data/b.csv": b"1\t30\t4\t200\n", "top/README": b"x"}


def tarred(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def containers(folder, make_zip):
    """The same parts in every container there is, as the keys of a source."""
    for name, content in PARTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    (folder / "all.zip").write_bytes(make_zip(**PARTS))
    (folder / "all.tar.gz").write_bytes(tarred(PARTS))
    (folder / "all.tar").write_bytes(gzip.decompress(tarred(PARTS)))
    names = [name for name in PARTS if name.endswith("csv")]
    packed = [{"local": f"all.{kind}", "member": names} for kind in ("zip", "tar.gz", "tar")]
    return [{"local": names}, {"local": [f"{name}.gz" for name in names]}, *packed]


def test_every_container_gives_the_same(make_card, containers):
    hashes = {get_dataset(make_card(sources=[source])).hash for source in containers}
    assert len(hashes) == 1 and get_dataset("toy").n_events == 3


def test_a_member_may_stand_in_another_folder_on_top(make_card, containers):
    data = get_dataset(make_card(sources=[{"local": "all.tar.gz", "member": ["data/a.csv", "b.csv"]}]))
    assert data.n_events == 3
    with pytest.raises(DataError, match=r"no member 'c.csv'; the archive holds top/data/a.csv"):
        get_dataset(make_card(sources=[{"local": "all.zip", "member": "c.csv"}]))


@pytest.mark.parametrize("evil", ["../evil", "/etc/evil", "a/../../evil"])
def test_a_tar_with_a_member_outside_is_refused(make_card, folder, evil):
    (folder / "x.tar.gz").write_bytes(tarred({**PARTS, evil: b"x"}))
    with pytest.raises(DataError, match="outside its folder"):
        get_dataset(make_card(sources=[{"local": "x.tar.gz", "member": "top/data/a.csv"}]))


def test_a_link_in_a_tar_is_no_file(make_card, folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (folder / "x.tar").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="'a' is a link or a folder"):
        get_dataset(make_card(sources=[{"local": "x.tar", "member": "a"}]))


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_hashes_of_the_files_in_an_archive(make_card, containers, wrong):
    good = [hashlib.md5(content).hexdigest() for name, content in PARTS.items() if name.endswith("csv")]
    hashes = ["0" * 32 if i == wrong else digest for i, digest in enumerate(good)]
    for source in containers:
        name = make_card(sources=[{**source, "file_md5": hashes}])
        if wrong is None:
            assert get_dataset(name).n_events == 3
        else:
            with pytest.raises(DataError, match=rf"[ab].csv(.gz)?: wrong md5: {good[wrong]} where 0000"):
                get_dataset(name)


def test_a_hash_for_every_file(make_card, containers):
    with pytest.raises(DataError, match="file_md5 names 1 hashes for 2 files"):
        get_dataset(make_card(sources=[{**containers[0], "file_md5": ["0" * 32]}]))


def test_a_part_that_is_missing_is_named(make_card, containers, folder):
    (folder / "top/data/b.csv").unlink()
    with pytest.raises(DataError, match=r"no b.csv in .*top/data"):
        get_dataset(make_card(sources=[containers[0]]))


@pytest.fixture
def unpublished(make_card, server, udata):
    def make(body=udata, **keys):
        return make_card(sources=[{**server.serve("u.data", body), "sha256": "none-published"}], **keys)

    return make


def test_a_download_that_nobody_vouches_for_is_written_down_and_told(unpublished, udata, tmp_path, caplog):
    digest = hashlib.sha256(udata).hexdigest()
    with caplog.at_level(logging.WARNING):
        data = get_dataset(unpublished(), progress=False)
    assert f"its publisher gives no hash; sha256 {digest} is written down at this first use" in caplog.text
    assert (tmp_path / "home/downloads/toy/u.data.sha256").read_text() == digest + "\n"
    assert data.source.endswith(f"/u.data (sha256 {digest}, none published)")
    assert get_dataset("toy", progress=False).source == data.source


def test_it_is_refused_where_it_has_changed_since(unpublished, udata, tmp_path):
    get_dataset(unpublished(), progress=False)
    (tmp_path / "home/downloads/toy/u.data").write_bytes(udata + b"1\t1\t1\t1\n")
    for prepared in (tmp_path / "home/prepared").iterdir():
        for path in prepared.iterdir():
            path.unlink()
    with pytest.raises(DataError, match=r"has changed since its first use: sha256 .* where .* was written down"):
        get_dataset("toy", progress=False)


def test_its_published_counts_are_what_verifies_it(unpublished):
    name = unpublished(published={"users": 2, "events": 5})
    with pytest.raises(DataError, match="4 events where 5 are published"):
        get_dataset(name, progress=False)
    assert verify(name) == ["4 events where 5 are published"]
    assert verify(unpublished(published={"users": 2, "events": 4})) == []
