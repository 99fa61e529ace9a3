"""Archives that want to do harm."""

import io
import stat
import struct
import zipfile

import pytest

from malloc_bench.data import DataError
from malloc_bench.data.sources import archive
from malloc_bench.data.sources.archive import open_parts, read_whole


@pytest.fixture
def read(tmp_path):
    def read(content, member="a/u.data"):
        path = tmp_path / "in" / "archive.zip"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            with open_parts([path], [member]) as [part]:
                return read_whole(part)
        finally:
            assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path], "something was unpacked"

    return read


def test_the_named_member_alone(read, make_zip):
    assert read(make_zip(**{"a/other": b"no", "a/u.data": b"yes"})) == b"yes"


@pytest.mark.parametrize("evil", ["../evil", "a/../../evil", "/etc/evil", "..\\evil"])
def test_an_archive_with_a_member_outside_is_refused(read, make_zip, evil):
    with pytest.raises(DataError, match="outside its folder"):
        read(make_zip(**{"a/u.data": b"fine", evil: b"evil"}))


def test_a_wrong_member_name_says_what_there_is(read, make_zip):
    with pytest.raises(DataError, match=r"no member 'a/u.data'; the archive holds b/u.data"):
        read(make_zip(**{"b/u.data": b""}))


def test_a_zip_bomb(read, make_zip):
    with pytest.raises(DataError, match="a zip bomb"):
        read(make_zip(**{"a/u.data": bytes(10_000_000)}))


def test_a_member_over_the_cap(read, make_zip, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", 10)
    assert read(make_zip(**{"a/u.data": b"0123456789"})) == b"0123456789"
    with pytest.raises(DataError, match="unpacks"):
        read(make_zip(**{"a/u.data": b"0123456789x"}))


def test_a_lying_size(read, make_zip):
    """The true size is 2,000: the declared one cannot be overrun unnoticed; the archive's checksum sees to the rest."""
    content = bytearray(make_zip(**{"a/u.data": bytes(range(200)) * 10}))
    directory = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, directory + 24, 10)
    with pytest.raises(DataError):
        read(bytes(content))


def test_a_link_is_no_file(read):
    link = zipfile.ZipInfo("a/u.data")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        read(buffer.getvalue())


@pytest.mark.parametrize("cut", [0, 10, -30])
def test_no_zip_or_half_of_one(read, make_zip, cut):
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(make_zip(**{"a/u.data": b"yes" * 100})[:cut])


def test_damaged_content(read, make_zip):
    content = bytearray(make_zip(**{"a/u.data": bytes(range(256)) * 4}))
    content[60] ^= 0xFF
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(bytes(content))
