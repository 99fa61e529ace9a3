"""Categories of items, from publishers' files about them."""

import numpy as np
import pytest

from malloc_bench.data import DataError, get_dataset
from malloc_bench.data.sources.cards import ABOUT_ITEMS

CSV = b'movieId,title,genres\r\n30,"A, B",Drama|War\r\n10,"""Quoted""",Comedy\r\n20,C,(none)\r\n'
DAT = "30::Amélie::Drama|War\n10::B: C::Comedy\n20::D::\n".encode("latin-1")
ITEM = b'item_id:token\tmovie_title:token_seq\tclass:token_seq\n30\tA "B\tDrama War\n10\tB\tComedy\n99\tC\tAction\n'
TAGS = b'video_id,author_id,tag\n10,1,5\n20,2,\n30,3,"12,5"\n'


def toy(make_card, tmp_path, monkeypatch, udata, files, categories):
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    for name, data in {"u.data": udata, **files}.items():
        (folder / name).write_bytes(data)
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(folder))
    return get_dataset(make_card(sources=[{"local": "u.data"}], categories=categories))


FILES = {
    "movielens-movies-csv": (CSV, [2, 1, 3]),  # (none) < Comedy < Drama
    "movielens-movies-dat": (DAT, [1, 0, 2]),
    "recbole-item": (ITEM, [2, 0, 3]),  # 20 is not in it; Action is of an item that nobody rated
    "kuairand-videos": (TAGS, [2, 0, 1]),  # sorted as words
}


@pytest.mark.parametrize("name", ABOUT_ITEMS)
def test_the_first_category_counts(make_card, tmp_path, monkeypatch, udata, name):
    data, codes = FILES[name]
    dataset = toy(make_card, tmp_path, monkeypatch, udata, {"items": data}, [{"local": "items", "format": name}])
    assert dataset.item_ids.tolist() == [10, 20, 30]
    assert dataset.categories.dtype == np.int64 and dataset.categories.tolist() == codes


def test_the_parts_of_a_file_are_read_as_one(make_card, tmp_path, monkeypatch, udata):
    files = {"a": b"video_id,tag\n30,b\n", "b": b"video_id,tag\n10,a\n20,b\n"}
    known = [{"local": ["a", "b"], "format": "kuairand-videos"}]
    assert toy(make_card, tmp_path, monkeypatch, udata, files, known).categories.tolist() == [1, 2, 2]


def test_files_about_items_change_neither_the_data_s_hash_nor_its_cache(make_card, tmp_path, monkeypatch, udata):
    known = [{"local": "items", "format": "movielens-movies-csv"}]
    with_them = toy(make_card, tmp_path, monkeypatch, udata, {"items": CSV}, known)
    without = get_dataset(make_card(sources=[{"local": "u.data"}]))
    assert with_them.hash == without.hash and without.categories is None
    assert len(list((tmp_path / "home" / "prepared").iterdir())) == 1


@pytest.mark.parametrize(
    "data, why",
    [
        (b"movieId,title\n10,A\n", "items: row 1: no column 'genres' among movieId, title"),
        (b"movieId,title,genres\nten,A,Drama\n", "items: row 2: movieId is 'ten', not an id"),
        (b"movieId,title,genres\n", "items: the file is empty but for its header"),
        (b"movieId,title,genres\n0010,A,Drama\n", "local items (has none of the data's items, not '10', but '0010')"),
        (b"", "items: no item is in it"),
        (None, "local items (no such file in "),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(make_card, tmp_path, monkeypatch, udata, data, why):
    files = {} if data is None else {"items": data}
    dataset = toy(
        make_card, tmp_path, monkeypatch, udata, files, [{"local": "items", "format": "movielens-movies-csv"}]
    )
    with pytest.raises(DataError, match=r"^toy: no source of its items' categories answered: local items ") as caught:
        _ = dataset.categories
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_the_next_source_answers_and_a_download_is_verified(make_card, tmp_path, monkeypatch, udata, server):
    right = server.serve("items.csv", CSV) | {"format": "movielens-movies-csv"}
    missing = {"local": "nowhere.csv", "format": "movielens-movies-csv"}
    where = make_card, tmp_path, monkeypatch, udata, {}
    with pytest.raises(DataError, match="sha256"):
        _ = toy(*where, [missing, right | {"sha256": "0" * 64}]).categories
    assert toy(*where, [right, missing]).categories.tolist() == [2, 1, 3]


def test_real_files(real_data):
    films = get_dataset("ml-1m")
    toy_story, goldeneye = (int(np.searchsorted(films.item_ids, film)) for film in (1, 10))  # Animation, Action
    assert films.categories.min() == 1 and films.categories.max() == 18
    assert films.categories[toy_story] == 3 and films.categories[goldeneye] == 1
    assert get_dataset("ml-latest-small").categories.max() == 19
