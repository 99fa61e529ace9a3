"""Archives that want to do harm."""

import gzip
import io
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from malloc_bench.data import DataError
from malloc_bench.data.sources import archive
from malloc_bench.data.sources.archive import Part, blocks, head, open_parts, read_whole


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


@pytest.mark.parametrize("name", ["f.gz", "f.tar.gz"])
def test_a_gzip_bomb_is_not_unpacked(tmp_path, name):
    content = (bytes(999) + b"\n") * 50_000
    if name == "f.tar.gz":
        with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as tar:
            info = tarfile.TarInfo("a")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        content = stream.getvalue()
    (tmp_path / name).write_bytes(gzip.compress(content))
    for read in (read_whole, lambda part: list(blocks(part, 1 << 16))):
        tracemalloc.start()
        members = ["a"] if "tar" in name else []
        with pytest.raises(DataError, match="a gzip bomb"), open_parts([tmp_path / name], members) as [part]:
            read(part)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 30_000_000


def test_small_files_may_unpack_to_many_times_their_size(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"1,2\n" * 100_000))
    with open_parts([tmp_path / "f.gz"]) as [part]:
        assert len(read_whole(part)) == 400_000 and head(part, 3) == b"1,2"


def test_a_zip_of_one_file_needs_no_member(tmp_path, make_zip):
    (tmp_path / "f.zip").write_bytes(
        make_zip(**{"a/log.csv": b"yes", **dict.fromkeys(("__MACOSX/._log.csv", ".DS_Store", "a/.cache/x"), b"")})
    )
    with open_parts([tmp_path / "f.zip"]) as [part]:
        assert read_whole(part) == b"yes" and part.name == "f.zip/a/log.csv"
    (tmp_path / "f.zip").write_bytes(make_zip(**{"./log.csv": b"yes"}))
    with open_parts([tmp_path / "f.zip"]) as [part]:
        assert read_whole(part) == b"yes"
    (tmp_path / "f.zip").write_bytes(make_zip(a=b"", b=b""))
    with (
        pytest.raises(DataError, match=r"f.zip holds 2 files: name one as member, of a, b"),
        open_parts([tmp_path / "f.zip"]),
    ):
        pass


@pytest.mark.parametrize("size", [3, 7, 100])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n\r\n \n"])
def test_blank_lines_are_rows_only_where_more_follows(size, end):
    text = b"\xef\xbb\xbfa\n\n \nb"
    found = list(blocks(Part("f", lambda: io.BytesIO(text + end)), size))
    assert b"".join(block for block, _ in found).rstrip(b"\r\n") == text[3:]
    assert sum(lines for _, lines in found) == 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "latin-1"])
def test_lines_come_as_utf_8(encoding):
    text = "a é\nb\n" * 50
    found = list(blocks(Part("f", lambda: io.BytesIO(text.encode(encoding))), 33, encoding))
    assert b"".join(block for block, _ in found).decode() == text
    with pytest.raises(DataError, match=r"f: after row \d+: is no text of utf-16"):
        list(blocks(Part("f", lambda: io.BytesIO(text.encode("utf-16")[:-1])), 33, "utf-16"))


def test_a_wrong_md5_is_met_in_whole_files_too():
    with pytest.raises(DataError, match="f: wrong md5"):
        read_whole(Part("f", lambda: io.BytesIO(b"x"), "0" * 32))


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


@pytest.mark.parametrize("member", [(), ("u.data",)])
def test_a_name_in_another_encoding_than_is_said(tmp_path, make_zip, member):
    data = bytearray(make_zip(**{"u.data": b"1\n"}))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 9] |= 8  # names are UTF-8, it says
    data[entry + 46] = 0xF1
    (path := tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"^a\.zip cannot be unpacked: [^\n]+$"), open_parts([path], member):
        pass


def test_damaged_content(read, make_zip):
    content = bytearray(make_zip(**{"a/u.data": bytes(range(256)) * 4}))
    content[60] ^= 0xFF
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(bytes(content))
