"""Cards are strict, and the shipped ones are whole."""

import pytest

from malloc_bench.data import DataError, list_datasets, load_card
from malloc_bench.data.sources import card_file, cards
from malloc_bench.registry import UnknownName

SHA = "0" * 64


def problem(make_card, **keys):
    with pytest.raises(DataError) as caught:
        load_card(make_card(**keys))
    assert "\n" not in str(caught.value) and "toy.yaml: " in str(caught.value)
    return str(caught.value).partition("toy.yaml: ")[2]


def test_shipped_cards_load():
    assert {"ml-100k", "ml-1m", "synthetic"} <= set(list_datasets())
    files = cards.card_files()
    for name in files:
        assert load_card(name, files).name == name


def test_an_unknown_name_suggests():
    with pytest.raises(UnknownName, match=r"no dataset is named 'ml100k'\. Did you mean 'ml-100k'\?"):
        load_card("ml100k")


def test_a_log_is_no_name_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text("user,item\n1,2\n")
    with pytest.raises(UnknownName, match=r"'log.csv', a file here: `malloc-bench data card log.csv` writes a card"):
        load_card("log.csv")


LOCAL = [{"local": "u.data"}]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"sources": LOCAL, "licens": "x"}, "licens: unknown key. Did you mean 'licence'?"),
        ({"sources": [{"local": "u.data", "formt": "x"}]}, "sources.0.formt: unknown key. Did you mean 'format'?"),
        ({"sources": [{"url": "https://x/y", "sha265": SHA}]}, "sources.0.sha265: unknown key. Did you mean 'sha256'?"),
        ({"sources": LOCAL, "published": {"user": 3}}, "published.user: unknown key. Did you mean 'users'?"),
        ({"sources": LOCAL, "title": 3}, "title: Input should be a valid string"),
        ({"sources": LOCAL, "format": "csv"}, "format: no format is named 'csv'."),
        (
            {"sources": LOCAL, "categories": [{"local": "u.item", "formt": "x"}]},
            "categories.0.formt: unknown key. Did you mean 'format'?",
        ),
        (
            {"sources": LOCAL, "categories": [{"local": "u.data"}]},
            "categories: each source needs a format that names categories: ",
        ),
        (
            {"sources": LOCAL, "categories": [{"local": "u.data", "format": "movielens-udata"}]},
            "categories: each source needs a format that names categories: movielens-movies-csv, ",
        ),
        (
            {"sources": [{"local": "u.item", "format": "recbole-item"}]},
            "card: format recbole-item is of files about items: it belongs to categories",
        ),
        ({"sources": [{"file": "u.data"}]}, "sources.0: a source is a mapping with one of the keys url, pip, local"),
        ({"sources": ["u.data"]}, "sources.0: a source is a mapping with one of the keys url, pip, local"),
        ({"sources": []}, "card: format synthetic needs parameters"),
        ({"sources": LOCAL, "format": "synthetic"}, "card: format synthetic needs parameters"),
        (
            {"sources": [{"url": "https://x/y"}]},
            "sources.0: needs md5, sha256 or file_md5, or says sha256: none-published",
        ),
        ({"sources": [{"url": "https://x/y", "md5": "abc"}]}, "sources.0.md5: String should match"),
        ({"sources": [{"local": "../u.data"}]}, "sources.0.local.0: must be a relative path without '..'"),
        ({"sources": [{"local": "/etc/passwd"}]}, "sources.0.local.0: must be a relative path without '..'"),
        (
            {"sources": [{"url": "https://x/y", "sha256": SHA, "member": "../x"}]},
            "sources.0.member.0: must be a relative",
        ),
        ({"sources": [{"pip": "x==1", "sha256": SHA, "member": "a/../../x"}]}, "sources.0.member: must be a relative"),
        ({"sources": [{"pip": "x>=1", "sha256": SHA, "member": "a"}]}, "sources.0.pip: String should match"),
        ({"sources": [{"pip": "-e.==1", "sha256": SHA, "member": "a"}]}, "sources.0.pip: String should match"),
    ],
)
def test_a_wrong_card_names_file_key_and_remedy(make_card, keys, message):
    assert problem(make_card, **keys).startswith(message)


def test_what_is_no_card(make_card):
    make_card(sources=LOCAL)
    path = next(cards.shipped("datasets").iterdir())
    for text, message in [("[1, 2]", "keys and values"), ("a: [", "toy.yaml"), ("!!python/object:os.x {}", "toy.yaml")]:
        path.write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            load_card("toy")
        assert "\n" not in str(caught.value)
    path.write_text("#" * (card_file.MAX_CARD_BYTES + 1))
    with pytest.raises(DataError, match="over 256 KB"):
        load_card("toy")


class Entry:
    """An entry point of an installed package."""

    name, value = "shop", "shop_package:folder"

    def __init__(self, found):
        self.found = found

    def load(self):
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


@pytest.fixture
def entries(monkeypatch):
    """entries(*what their entry points hold): installed packages that add data sets."""

    def install(*found):
        made = [Entry(each) for each in found]
        monkeypatch.setattr(cards.metadata, "entry_points", lambda group: made * (group == "malloc_bench.datasets"))
        cards._warn.cache_clear()

    return install


def test_installed_packages_add_cards(make_card, tmp_path, entries, caplog):
    make_card(sources=LOCAL)
    (tmp_path / "theirs").mkdir()
    text = (tmp_path / "cards" / "toy.yaml").read_text()
    (tmp_path / "theirs" / "shop.yaml").write_text(text)
    entries(tmp_path / "theirs")
    assert list_datasets() == ["shop", "toy"] and not caplog.text
    (tmp_path / "theirs" / "toy.yaml").write_text(text)
    assert cards.card_files()["toy"] == tmp_path / "cards" / "toy.yaml"
    assert "two cards are named 'toy'" in caplog.text


@pytest.mark.parametrize(
    "found, why",
    [(RuntimeError("no\nnetwork"), "no network"), (SystemExit(), "SystemExit"), (3, "int"), (None, "None")],
)
def test_a_bad_entry_point_is_one_warning_that_names_it(make_card, entries, caplog, found, why):
    make_card(sources=LOCAL)
    entries(found, "/not/there")
    for _ in range(2):
        assert list_datasets() == ["toy"]
    [first, second] = [record.getMessage() for record in caplog.records]
    assert first.startswith("datasets 'shop' of shop_package:folder is left out: ") and why in first
    assert "/not/there" in second and "\n" not in first


def test_one_card_may_stand_for_many_data_sets(make_card):
    variants = {
        "beauty": {"category": "Beauty", "published": {"events": 3}},
        "toys": {"category": "Toys_and_Games", "sources": [{"local": "{category}.txt", "format": "user-items"}]},
    }
    sources = [{"url": "https://x/{category}_5.json.gz", "sha256": "none-published"}]
    make_card(title="Reviews, {category}", format="amazon-json", sources=sources, variants=variants)
    assert list_datasets() == ["toy-beauty", "toy-toys"]
    beauty, toys = load_card("toy-beauty"), load_card("toy-toys")
    assert (beauty.name, beauty.family, beauty.title) == ("toy-beauty", "toy", "Reviews, Beauty")
    assert [str(source) for source in beauty.sources] == ["https://x/Beauty_5.json.gz"]
    assert [str(source) for source in toys.sources] == [
        "https://x/Toys_and_Games_5.json.gz",
        "local Toys_and_Games.txt",
    ]
    assert beauty.published.events == 3 and beauty.published.users is None and toys.published is None
    with pytest.raises(UnknownName, match=r"no dataset is named 'toy'"):
        load_card("toy")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"keep": ["ratng"]}, "card: keep: format movielens-udata has no feedback 'ratng'. Did you mean 'rating'?"),
        ({"keep": [], "label": {"column": "rating"}}, "card: keep has not the label's column 'rating'"),
        ({"format": "movielens-udta"}, "format: no format is named 'movielens-udta'. Did you mean 'movielens-udata'?"),
        ({"sources": [{"local": []}]}, "sources.0.local: Value should have at least 1 item"),
        ({"variants": {"a": 3}}, "variants.a: expected keys and values"),
    ],
)
def test_a_wrong_key_of_a_streaming_card(make_card, keys, message):
    make_card(**{"sources": LOCAL, **keys})
    with pytest.raises(DataError) as caught:
        load_card("toy-a" if "variants" in keys else "toy")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_shipped_cards_promise():
    names = list_datasets()
    for name in ("ml-10m", "ml-20m", "ml-25m", "ml-32m", "kuairand-pure", "kuairand-1k", "kuairand-27k", "kuairec-big"):
        card = load_card(name)
        assert any(getattr(source, "md5", None) for source in card.sources) and card.published.events
    for name in ("amazonelectronics-x1", "kuaivideo-x1", "microvideo-x1"):
        assert all(source.file_md5 for source in load_card(name).sources)
    for year in (2014, 2018, 2023):
        for category in ("beauty" if year == 2014 else "video-games", "sports", "toys", "electronics", "books"):
            assert {f"amazon-{year}-{category}", f"amazon-{year}-ratings-{category}"} <= set(names)
    files = cards.card_files()
    for name in names:
        card = load_card(name, files)
        assert "{" not in f"{card.title}{card.description}{[str(source) for source in card.sources]}"
