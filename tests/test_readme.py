"""What the README tells a new user to do, done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from malloc_bench import registry
from malloc_bench.cli.commands import main
from malloc_bench.report.evidence import significance
from malloc_bench.results import load_results

Typed = Callable[[str], str]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.name: path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
TINY = """
name: tiny
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 30}}]
compressors: [full, recent, {snapkv: {window: 4}}, knorm]
budgets: [0.25]
training: {epochs: 1, batch_size: 64}
measure: {latency: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "my_method.py").write_text(code)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def typed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """typed(line): what a line of the README prints, which ends well; in `folder`, whose parts are gone afterwards."""
    monkeypatch.chdir(folder)
    registry.names("compressors"), registry.names("backbones")  # those of ours stay known
    monkeypatch.setattr(registry, "_parts", {kind: dict(parts) for kind, parts in registry._parts.items()})

    def run(line: str) -> str:
        words = line.split("#")[0].split()
        assert words[0] == "malloc-bench"
        code, said = main(words[1:]), capsys.readouterr()
        assert code == 0, said.out + said.err
        return said.out

    return run


def test_the_snippet_is_compared_with_baselines(typed: Typed) -> None:
    (line,) = re.findall(r"^malloc-bench compare my_method.*$", README, re.M)
    out = typed(line.replace("--suite quick", "--suite tiny.yaml"))
    for name in ("my_method", "snapkv", "recent", "full"):
        assert re.search(rf"^\W*{name}\b", out, re.M), out
    assert not re.search(r"^\W*knorm\b", out, re.M)
    assert re.search(r"[+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]", out)
    assert "5 ok" in out and "0 failed" in out


@pytest.mark.slow
def test_the_snippet_stands_in_a_suite_of_ones_own(folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"`(malloc-bench --use [^`]*)`", README.replace("\n", " "))
    (folder / "mine.yaml").write_text(TINY.replace("knorm", "{my_method: {grid: {power: [1.0, 2.0]}}}"))
    assert "5 ok" in typed(f"{line} --out run --workers 2")
    again = line.replace("run mine.yaml", "reproduce run compressor=my_method(power=2.0)")
    assert "reproduced" in typed(again)
    monkeypatch.setattr(registry, "_parts", {kind: dict(parts) for kind, parts in registry._parts.items()})
    registry._parts["compressors"].pop("my_method")
    assert main(["run", "mine.yaml"]) == 2  # it is known where it was named alone


def test_the_snippet_keeps_every_promise(typed: Typed) -> None:
    (line,) = re.findall(r"^malloc-bench check my_method.*$", README, re.M)
    typed(line)


@pytest.mark.parametrize("name", ["Unusual", "Shallow", "ByJumps", "SixBits", "GatedSASRec"])
def test_the_other_snippets_keep_every_promise(name: str, folder: Path, typed: Typed) -> None:
    (code,) = [
        code for code in re.findall(r"```py\n(.*?)```", README + PAGES["parts.md"], re.S) if f"class {name}(" in code
    ]
    (folder / "snippet.py").write_text(code)
    out = typed(f"malloc-bench check snippet.py:{name}")
    kept, total = re.findall(r"^(\d+) of (\d+) promises", out, re.M)[0]
    assert kept == total and int(total) > 25


def test_every_command_of_the_table_is_there(typed: Typed) -> None:
    table = re.findall(r"^\| `malloc-bench ([a-z]+)", README, re.M)
    known = typed("malloc-bench --help")
    assert len(table) > 8 and all(f" {name} " in known for name in table)


def commands() -> list[str]:
    """What the pages tell to type: whole lines of code blocks, and code within a text that names all it needs."""
    blocks = [line for text in PAGES.values() for line in re.findall(r"^malloc-bench .*$", text, re.M)]
    within = [
        line for text in PAGES.values() for line in re.findall(r"`(malloc-bench [^`]*)`", text.replace("\n", " "))
    ]
    return sorted({" ".join(line.split("#")[0].split()) for line in blocks + within})


def test_the_pages_tell_many_commands() -> None:
    assert len(commands()) > 40


@pytest.mark.parametrize("line", commands())
def test_every_command_of_every_page_can_be_typed(line: str) -> None:
    """It is parsed as it stands, options and their values too, and a suite or a part that it names is there."""
    from typer.main import get_command

    from malloc_bench.cli.commands import app
    from malloc_bench.registry import names
    from malloc_bench.suite import load_suite

    words = re.sub(r" --use \S+", "", line.replace("\\|", "|")).split()[1:]
    words = [word.split("|")[0].strip("[]") for word in words if word not in ("...", "RUN...")]
    command = get_command(app)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    if not words:  # the command is only named
        return
    parsed = command.make_context("malloc-bench", list(words), resilient_parsing="..." in line)
    given = parsed.params
    if (suite := given.get("suite")) and re.fullmatch(r"[a-z_0-9]+", suite) and suite not in ("tiny",):
        load_suite(suite)
    if line.startswith("malloc-bench show ") and given["name"].islower():
        assert given["name"] in {*names("compressors"), *names("backbones")}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    folder = ROOT if name in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", PAGES[name])):
        if path.endswith(".md") or not path:
            assert not anchor or anchor in anchors(PAGES[Path(path).name or name]), f"{path}#{anchor}"
        assert "://" in path or (folder / path).exists(), path


def anchors(page: str) -> set[str]:
    """What GitHub calls a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


def test_the_finding_is_what_the_committed_rows_say() -> None:
    names = ("full", "fit_keys", "kmeans", "fit_constant", "recent", "none")
    loaded = {run: load_results(ROOT / "results" / run) for run in ("methods", "fitted")}
    rows = loaded["fitted"].filter(pl.col("budget").is_null() | (pl.col("budget") == "0.015625"))
    told = README.split("**The finding:")[1].split("\n\n")[1].splitlines()[2:]
    for line, name in zip(told, names, strict=True):
        cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]
        for backbone, (overlap, ndcg, size) in zip(("sasrec", "hstu"), (cells[:3], cells[3:])):
            mean = rows.filter(
                pl.col("backbone") == backbone,
                (pl.col("compressor") == name)
                | (pl.col("compressor_params").str.contains(f'"{name}"') & (pl.col("compressor") == "compose")),
            ).select(pl.col("overlap@10", "ndcg@10", "bytes_mean").mean(), pl.len())
            assert mean.item(0, 3) == 3, (name, backbone)
            assert overlap == f"{mean.item(0, 0):.3f}".lstrip("0").replace("1.000", "1"), (name, backbone)
            assert ndcg == f"{mean.item(0, 1):.4f}".lstrip("0"), (name, backbone)
            assert size == f"{mean.item(0, 2):,.0f}", (name, backbone)
    fitted = "fit_|auto|moments|still|cartridge|oracle|recompute|ids_"
    for backbone, best in (("sasrec", ".836 of the lists"), ("hstu", ".850 (HSTU, `kvtc`")):
        found = pl.concat(loaded.values()).filter(
            pl.col("backbone") == backbone, pl.col("ratio") < 1 / 63, pl.col("overlap@10").is_not_null(),
            ~(pl.col("compressor") + pl.col("compressor_params")).str.contains(fitted),
        )  # fmt: skip
        most = found.group_by("compressor", "compressor_params", "budget").agg(pl.col("overlap@10").mean())
        assert f"{most['overlap@10'].max():.3f}".lstrip("0") + best[4:] in README
    folder = ROOT / "results" / "fitted_wide"
    wide = load_results(folder).filter(backbone="sasrec")
    at = (pl.col("compressor").str.contains("fit_keys"), pl.col("budget") == "1.5625 %")
    ends = significance(wide, folder).filter(*at).select("delta", "delta_lo", "delta_hi").row(0)
    full, constant = (wide.filter(compressor=name)["ndcg@10"].mean() for name in ("full", "fit_constant"))
    said = "{:+.4f} [{:+.4f}, {:+.4f}] of {:.4f}".format(*ends, full).replace("0.", ".")
    lossless = significance(load_results(folder := ROOT / "results" / "auto"), folder).filter(
        compressor="auto", lossless=True
    )
    auto, less = lossless.filter(budget="1.5625 %"), lossless.filter(budget="0.78125 %")
    assert less["backbone"].str.starts_with("sasrec").to_list() == [True]
    ends = less.select("delta", "delta_lo", "delta_hi").row(0)
    assert "at 1/128, {:+.4f} [{:+.4f}, {:+.4f}].".format(*ends).replace("0.", ".") in README
    for lost in auto.select("delta", "delta_lo", "delta_hi").iter_rows():
        assert "{:+.4f} [{:+.4f}, {:+.4f}] of".format(*lost).replace("0.", ".") in README.replace("\n", " ")
    assert (
        len(auto) == 2
        and said in README
        and f"that vector costs {100 - 100 * constant / full:.0f} % of NDCG@10" in README
    )
