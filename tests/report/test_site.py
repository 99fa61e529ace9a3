"""The site: links that resolve, hostile names that stay text, and nothing from elsewhere."""

import os
import re
from html.parser import HTMLParser

import pytest

from malloc_bench.cli import main
from malloc_bench.report.site import write_site
from malloc_bench.report.site.content import file_of
from malloc_bench.results import write_row

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y> ../../etc \u202e & {{ 7*7 }}"


class Seen(HTMLParser):
    """Tags, links, and the text of every table, row by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.rows, self.said, self.inside = [], [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name for name, _ in attrs}))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data):
        self.said += data
        if self.inside:
            self.rows[-1][-1] += data.strip()


def put(folder, row, name, overlap, **more):
    lost = more.pop("lost", 0.01)
    values = {"ndcg@10": 0.2 - lost, "delta_ndcg@10": -lost, "delta_ndcg@10_lo": -lost - 0.001,
              "delta_ndcg@10_hi": -lost + 0.001, "overlap@10": overlap}  # fmt: skip
    ratio = more.pop("ratio", 0.25)
    family = "baseline" if name in ("full", "none") else "eviction"
    sizes = {"ratio": ratio, "bytes_mean": 1000 * ratio}
    write_row(folder / "rows", row(compressor=name, **{"family": family} | values | sizes | more))


def table(folder, row, dataset, scores, **more):
    """The full state, a floor of overlap 0.5, and methods at 25 %."""
    put(folder, row, "full", 1.0, dataset=dataset, ratio=1.0, lost=0.0, **more)
    put(folder, row, "none", 0.5, dataset=dataset, ratio=0.0, lost=0.1, **more)
    for name, overlap in scores.items():
        put(folder, row, name, overlap, dataset=dataset, budget=0.25, **more)


@pytest.fixture
def site(tmp_path, row):
    runs = tmp_path / "results"
    table(runs / "one", row, "ml-1m", {"h2o": 0.8, "tova": 0.9})
    table(runs / "two", row, "beauty", {"h2o": 0.7, HOSTILE: 0.6}, backbone="hstu")
    table(runs / "two", row, HOSTILE, {"h2o": 0.6}, backbone=HOSTILE)
    write_site(runs, tmp_path / "site")
    return tmp_path / "site"


def test_only_what_is_complete_has_an_average(site):
    seen = Seen((site / "index.html").read_text())
    assert "Retrieval, at 25 %: 3 tables" in seen.said and "2 methods that are not in all 3 tables" in seen.said
    rows = {cells[1]: cells for cells in seen.rows if len(cells) == 8}
    # fidelity: (0.8 - 0.5) / 0.5, 0.4 and 0.2
    assert rows["h2o"] == ["1", "h2o", "eviction", "3 of 3", "0.400", "25.00", "", "one, two"]
    assert rows["tova"] == ["", "tova", "eviction", "1 of 3", "", "", "", "one"]


def test_without_headroom_a_table_is_not_counted(tmp_path, row):
    table(tmp_path / "one", row, "ml-1m", {"h2o": 0.8})
    table(tmp_path / "two", row, "beauty", {"tova": 0.7})
    put(tmp_path / "two", row, "none", 0.5, dataset="beauty", ratio=0.0, lost=0.0)
    write_site(tmp_path, tmp_path / "site")
    said = Seen((tmp_path / "site/index.html").read_text()).said
    assert "Retrieval, at 25 %: 1 table" in said and "not in all" not in said
    assert "No headroom" in (tmp_path / "site/dataset-beauty.html").read_text()


def test_the_newest_run_of_a_table_counts(tmp_path, row):
    table(tmp_path / "a", row, "ml-1m", {"h2o": 0.8}, created_at="2026-02-01T00:00:00+00:00")
    table(tmp_path / "b", row, "ml-1m", {"h2o": 0.9}, created_at="2026-01-01T00:00:00+00:00")
    write_site(tmp_path, tmp_path / "site")
    rows = [cells for cells in Seen((tmp_path / "site/index.html").read_text()).rows if cells[3:4] == ["1 of 1"]]
    assert [(cells[4], cells[-1]) for cells in rows] == [("0.600", "a")]
    page = Seen((tmp_path / "site/dataset-ml-1m.html").read_text())  # but both are there, each with its folder
    assert [cells[-1] for cells in page.rows if cells[0] == "h2o"] == ["a", "b"]


def test_every_link_resolves_and_every_page_is_linked(site):
    linked = {"index.html"}
    for path in site.iterdir():
        for link in Seen(path.read_text()).links:
            assert re.fullmatch(r"[a-z0-9-]+\.html", link) and (site / link).is_file(), link
            linked.add(link)
    assert linked == {path.name for path in site.iterdir()}
    assert {"dataset-ml-1m.html", "backbone-hstu.html", "method-h2o.html", "method-full.html"} <= linked
    assert file_of("of", HOSTILE) in linked


def test_hostile_names_stay_text_and_nothing_comes_from_elsewhere(site):
    for path in site.iterdir():
        text = path.read_text()
        seen = Seen(text)
        tags = {tag for tag, _ in seen.tags}
        assert not tags & {"script", "img", "link", "iframe", "object"} and "</html>" in text
        assert not any(name.startswith("on") for _, names in seen.tags for name in names)
        assert not re.search(r"(https?:)?//|url\(|@import", text.replace("</", "")), path
        assert "default-src 'none'" in text and "49" not in seen.said.split("etc")[-1][:20]
    assert HOSTILE.split(" \u202e")[0] in Seen((site / file_of("dataset", HOSTILE)).read_text()).said


def test_the_same_results_give_the_same_bytes(site, tmp_path):
    write_site(tmp_path / "results", tmp_path / "again")
    for path in site.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_pages_of_what_is_gone_are_removed_and_no_others(site, tmp_path):
    (site / "notes.html").write_text("<p>my own</p>")
    assert (site / "method-tova.html").is_file()
    (site / "folder.html").mkdir()
    (site / "gone.html").symlink_to(tmp_path / "nowhere")
    os.mkfifo(site / "pipe.html")
    write_site(tmp_path / "results" / "two", site)
    assert not (site / "method-tova.html").exists() and (site / "method-h2o.html").is_file()
    assert (site / "notes.html").read_text() == "<p>my own</p>"


def test_names_that_differ_have_pages_that_differ():
    names = ["h2o", "H2O", "h2o!", "h-2o", "", "日本", "日", "a" * 80, "a" * 81]
    assert len({file_of("of", name) for name in names}) == len(names) and file_of("of", "h2o") == "method-h2o.html"


def test_a_damaged_run_is_left_out_and_named(site, tmp_path, caplog):
    (tmp_path / "results" / "three").mkdir()
    (tmp_path / "results" / "three" / "results.parquet").write_bytes(b"rotten")
    write_site(tmp_path / "results", tmp_path / "site")
    assert "Left out: three" in (site / "index.html").read_text() and "left out" in caplog.text


def test_rows_that_were_all_skipped_are_no_error(tmp_path, row):
    write_row(tmp_path / "one" / "rows", row(compressor="h2o", status="skipped", reason="no data"))
    assert [path.name for path in write_site(tmp_path, tmp_path / "site")] == ["index.html"]


def test_the_command(site, tmp_path, capsys):
    assert main(["site", str(tmp_path / "results" / "one"), "--out", str(tmp_path / "single")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/single/index.html and 6 more pages\n"
    assert main(["site", str(tmp_path / "single")]) == 2
    assert "holds no runs" in capsys.readouterr().err
