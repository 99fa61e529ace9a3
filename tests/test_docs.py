"""Every command that the pages tell, run as it stands there, in one folder, on a run of seconds for one of minutes."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from test_readme import README, commands

from malloc_bench.cli.commands import main
from malloc_bench.paths import shipped

QUICK = """
name: quick
datasets: [synthetic]
split: leave_one_out
backbones: [{hstu: {layers: 1, dim: 8, max_length: 30}}]
compressors: [full, none, random, recent, {snapkv: {window: 4}}, kmeans]
budgets: [0.5, 0.25, 0.125, 0.03125]
training: {epochs: 1, batch_size: 64}
measure: {seconds: 0.01, store: dict}
"""
STANDS_FOR = {
    **dict.fromkeys(("RUN", "RUN..."), "quick"),
    **dict.fromkeys(
        ("FILE:CLASS", "FILE.py:GatedSASRec", "my.py:Mine", "your_file.py:YourMethod"), "my_method.py:MyMethod"
    ),
    **dict.fromkeys(("SUITE", "SUITE.yaml", "S"), "quick.yaml"),
    **{"mine.yaml": "mysuite.yaml", "FILE": "mylog.csv", "CELL": "compressor=recent,budget=0.25"},
    **{"a,b": "recent,random", "i/60": "1/60", "DIR": "merged", "[WORDS]": "a", "results/": "runs/"},
}  # fmt: skip
SHIPPED = {path.stem for path in shipped("suites").glob("*.yaml")}


def elsewhere(words: tuple[str, ...]) -> bool:
    """Shipped suites are run at a small size by tests/run/test_shipped.py, checks and jobs by tests of their own."""
    return words[0] in ("check", "submit") or (
        words[0] == "run" and Path(words[1]).stem in SHIPPED and words[1] != "quick.yaml"
    )


def typed(line: str) -> list[list[str]]:
    """The words of a command, each thing that it has as a placeholder or a choice said."""
    words = line.replace("\\|", "|").split()[1:]
    if words[-1] == "...":
        words[-1] = {"--columns": "hr@10", "--only": "backbone=hstu"}[words[-2]]
    name = "./mylog.yaml" if words[0] == "data" else "svd"
    words = [STANDS_FOR.get(word, name if word == "NAME" else word) for word in words]
    words = [re.sub(r"^results/\w+$", "quick", word) for word in words]
    if words[0] in ("run", "tune", "compare"):
        words = ["quick.yaml" if word == "quick" else word for word in words]
        asks = words[0] == "compare" and ":" in words[1] and "--suite" not in words
        words += ["--suite", "quick.yaml"] if asks else []
    choices = [word.split("|") for word in words]
    most = max(map(len, choices))
    return [list(each) for each in itertools.islice(zip(*(itertools.cycle(c) for c in choices)), most)]


def every() -> list[list[str]]:
    """What is run: the runs first, which the others ask about; commands alone are only named."""
    found = {tuple(words) for line in commands() if len(line.split()) > 2 for words in typed(line)}
    found = {words for words in found if not elsewhere(words) and words != ("data", "stats")}
    order = {"data": -2, "tune": -1, "run": 0, "merge": 1}
    return sorted(map(list, found), key=lambda words: (order.get(words[0], 2), "--tuned" in words, words))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README has it: a log, the suite beside it, a method of one's own."""
    folder = tmp_path_factory.mktemp("place")
    (suite,) = re.findall(r"```yaml\n(name: mine\n.*?)```", README, re.S)
    (folder / "mysuite.yaml").write_text(suite + "training: {epochs: 1}\nmeasure: {latency: false}\n")
    (folder / "quick.yaml").write_text(QUICK)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (folder / "my_method.py").write_text(code)
    lot = random.Random(0)
    rows = [(f"u{user}", f"i{lot.randrange(40)}", 86_400 * day + user) for user in range(30) for day in range(12)]
    text = "".join(f"{who},{what},{1_700_000_000 + when}\n" for who, what, when in rows)
    (folder / "mylog.csv").write_text("user,item,timestamp\n" + text)
    return folder


@pytest.mark.slow  # reports of ten runs, with their figures
def test_the_commands_of_the_pages_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reports: None
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(place / "home"))
    wrong = []
    for words in every():
        code, said = main(words), capsys.readouterr()
        if words[0] == "fit" and "no law could be fitted" in said.err:
            continue  # of a run of one size each; tests/report/test_laws.py fits some
        if code != 0 or not said.out:
            wrong.append(f"{' '.join(words)}: {code}\n{said.err}")
    assert not wrong, "\n".join(wrong)
