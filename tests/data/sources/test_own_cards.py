"""A card of the user's own: named by its path, beside its files, and with no more in it than is needed."""

import pytest
import yaml

from malloc_bench.data import DataError, get_dataset, load_card, verify
from malloc_bench.data.sources.cards import is_path

LOG = "who,what,when\n" + "".join(f"u{i % 3},i{i % 5},{1_600_000_000 + i}\n" for i in range(30))
TABLE = {"user": "who", "item": "what", "time": "when"}
WORLD = {
    "format": "synthetic",
    "parameters": {
        "users": 2**62, "items": 8, "seed": 0, "clusters": 4, "zipf": 1.0, "shortest": 2, "median": 3, "longest": 4,
    },
}  # fmt: skip
SHORT = {"format": "table", "local": "log.csv", "table": TABLE}


@pytest.fixture
def own(tmp_path):
    """own(keys, name): the path of a card with those keys, its log beside it."""

    def write(keys, name="shop.yaml"):
        (tmp_path / "log.csv").write_text(LOG)
        path = tmp_path / name
        path.write_text(keys if isinstance(keys, str) else yaml.safe_dump(keys))
        return path

    return write


def test_what_is_a_path():
    assert all(map(is_path, ("./a.yaml", "a.yaml", "a.yml", "/x/y", "a.yaml:v", "../b.yaml")))
    assert not any(map(is_path, ("ml-100k", "toy", "a.yam", "")))


def test_a_card_beside_its_log_needs_its_columns_only(own, tmp_path, monkeypatch):
    path = own(SHORT)
    data = get_dataset(path)
    assert (data.name, data.n_users, data.n_items, data.n_events) == ("shop", 3, 5, 30)
    assert data.source == f"local {tmp_path / 'log.csv'}" and data.card.title == "shop" and verify(str(path)) == []
    monkeypatch.chdir(tmp_path)
    assert get_dataset("./shop.yaml").hash == get_dataset("shop.yaml").hash == data.hash


def test_files_may_lie_beside_the_card_under_the_data_folder_or_anywhere(own, tmp_path, monkeypatch):
    path = own(SHORT)
    first = get_dataset(path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "log.csv").rename(tmp_path / "mine" / "log.csv")
    with pytest.raises(DataError, match=f"no such file in {tmp_path}"):
        get_dataset(path)
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path / "mine"))
    assert get_dataset(path).hash == first.hash
    monkeypatch.delenv("MALLOC_BENCH_DATA")
    for local in (str(tmp_path / "mine" / "log.csv"), "cards/../mine/log.csv"):
        (tmp_path / "cards").mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**SHORT, "local": local}))
        assert get_dataset(path).hash == first.hash


def test_two_logs_of_one_name_are_not_mixed_up(own, tmp_path):
    first = get_dataset(own(SHORT))
    (tmp_path / "log.csv").write_text(LOG + "u9,i9,1600000999\n")
    assert get_dataset(tmp_path / "shop.yaml").n_events == first.n_events + 1


def test_variants_of_an_own_card_are_named_behind_its_path(own, tmp_path):
    variants = {"all": {"file": "log.csv"}, "none": {"file": "nothing.csv"}}
    path = own({"format": "table", "table": TABLE, "sources": [{"local": "{file}"}], "variants": variants})
    assert get_dataset(f"{path}:all").name == "shop-all"
    for spec in (str(path), f"{path}:any"):
        with pytest.raises(DataError, match="name one of its variants, as in shop"):
            load_card(spec)
    with pytest.raises(DataError, match="it has no variant 'x'"):
        load_card(f"{own(SHORT)}:x")


@pytest.mark.parametrize(
    ("keys", "name", "message"),
    [
        (SHORT, "ml-100k.yaml", "the name 'ml-100k' belongs to "),
        (SHORT, "a b.yaml", "a data set is named by letters"),
        ({**SHORT, "tabel": {}}, "shop.yaml", "tabel: unknown key. Did you mean 'table'?"),
        ({**SHORT, "table": {**TABLE, "usr": "x"}}, "shop.yaml", "table.usr: unknown key. Did you mean 'user'?"),
        ({**SHORT, "table": "who"}, "shop.yaml", "table: "),
        ({**SHORT, "table": None}, "shop.yaml", "format table needs the key table"),
        ({**SHORT, "format": "movielens-csv"}, "shop.yaml", "format table needs the key table"),
        ({**SHORT, "label": {"column": "stars"}}, "shop.yaml", "label: no feedback is called 'stars'."),
        ({**SHORT, "local": None}, "shop.yaml", "sources.0.local: "),
        ({"format": "table", "table": TABLE}, "shop.yaml", "needs parameters and no sources"),
        ({**SHORT, "variants": ["a"]}, "shop.yaml", "variants: expected keys and values, not ['a']"),
        ({**SHORT, "published": {"users": 10**30}}, "shop.yaml", "is beyond 63 bits"),
        ({**SHORT, 3: 4}, "shop.yaml", "the key 3 is no text"),
        (WORLD, "shop.yaml", "parameters: users x longest, and items, may be 100,000,000 at most"),
        ({**SHORT, "name": "other"}, "shop.yaml", "name: unknown key. The file's name is the data set's"),
        ({**SHORT, "sources": []}, "shop.yaml", "local is short for one of the sources: leave out one of the two"),
        ("a: [", "shop.yaml", "line "),
        ("", "shop.yaml", "expected keys and values, found nothing"),
    ],
)
def test_what_an_own_card_has_wrong_is_one_line(own, keys, name, message):
    path = own(keys, name)
    with pytest.raises(DataError) as caught:
        get_dataset(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_card_that_is_not_there(tmp_path):
    for spec in ("./none.yaml", str(tmp_path), f"{tmp_path}/", "x" * 5000 + ".yaml", "a\0.yaml"):
        with pytest.raises(DataError):
            get_dataset(spec)


def test_words_of_variants_cannot_grow_without_end(own):
    words = {f"w{i}": f"{{w{i + 1}}}{{w{i + 1}}}" for i in range(60)}
    card = load_card(f"{own({**SHORT, 'title': '{w0}', 'variants': {'a': words}})}:a")
    assert card.title == "{w1}{w1}"  # words are put in once
    for bad in ("x" * 999, ["x"] * 999, [["x"]], {"a": "b"}):
        with pytest.raises(DataError, match=r"variants.a.w: expected at most"):
            load_card(f"{own({**SHORT, 'variants': {'a': {'w': bad}}})}:a")
    with pytest.raises(DataError, match="a list cannot stand inside other text"):
        load_card(f"{own({**SHORT, 'title': 'x {w}', 'variants': {'a': {'w': ['x']}}})}:a")
