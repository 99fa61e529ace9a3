"""The fault campaign: tiny suites of every kind, hurt in every way, run again, and held against runs that nobody hurt.

`make campaign` (60 minutes at most; `--minutes N`, `--trials N`, `--seed N`, `--only WORD`), or by hand:
python tests/faults/campaign.py --minutes 60 --write docs/reliability.md
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from checking import Rows, after_the_hurt, after_the_next, kept, rows, unmeasured
from forking import forked, preload, reporting
from hurting import FAULTS, Fault
from nodes import Nodes
from trial import OPS, Trial, shim

BASE = """
name: tiny
datasets: [./log.yaml]
backbones: [{sasrec: {layers: 1, heads: 2, dim: 8, max_length: 12}}]
budgets: [0.25]
training: {epochs: 2, batch_size: 128}
"""
PLAIN = "measure: {latency: false, flops: false}\n"
RETRIEVAL = BASE + "split: leave_one_out\n" + PLAIN + "compressors: [full, none, recent, int8, fit_constant]\n"
ASKED = BASE + "split: leave_one_out\ncompressors: [full, none, recent]\n"
CUT = "compressors: [full, none, {gqa: {n_kv_heads: 1}}, {compose: [{mla: {latent: 6}}, recent]}]"
RUN = ("run", "suite.yaml", "--out", "{out}", "--quiet")
CARD = """
format: table
local: log.csv
table: {user: who, item: what, time: when, unit: s, rating: stars}
label: {column: rating, at_least: 4}
"""


@dataclass(frozen=True)
class Tiny:
    """A suite of less than a second. weight: of so many trials it gets one; short: whether the short form has it."""

    name: str
    text: str
    commands: tuple[tuple[str, ...], ...] = (RUN,)
    weight: int = 1
    short: bool = True
    reports: bool = False


REDIS = "measure: {latency: false, flops: false, seconds: 0.01, users: 4, store: redis, candidates: [1]}\n"
SUITES = (
    Tiny("retrieval", RETRIEVAL + "seeds: [0, 1]\n"),
    Tiny("ranking", BASE + PLAIN + "tasks: [ranking]\nsplit: ratio\ncompressors: [full, none, recent, svd]\n"),
    Tiny("requests", ASKED + REDIS.replace("redis", "lmdb")),
    Tiny("times", ASKED + "measure: {latency: true, flops: true, seconds: 0.01, users: 4, drift: [1]}\n"),
    Tiny(
        "tuned",
        BASE + "split: leave_one_out\n" + PLAIN + "compressors: [full, none, recent, {ends: {}}]\n",
        (("tune", "suite.yaml", "--out", "tune", "--quiet"), (*RUN, "--tuned", "tune/tuned.yaml")),
    ),
    Tiny("structural", f"{BASE}split: leave_one_out\n{PLAIN}{CUT}\n"),
    Tiny("redis", ASKED + REDIS),
    Tiny("reports", RETRIEVAL.replace("int8, fit_constant", "int8"), weight=6, short=False, reports=True),
    Tiny("workers", RETRIEVAL + "seeds: [0, 1]\n", ((*RUN, "--workers", "2"),), weight=8, short=False),
    Tiny(
        "ray",
        RETRIEVAL + "seeds: [0, 1]\n",
        ((*RUN, "--workers", "2", "--executor", "ray", "--address", "{address}"),),
        weight=12,
        short=False,
    ),
    Tiny("limits", RETRIEVAL + "seeds: [0, 1]\nlimits: {seconds: 600, memory: 20GB}\n", weight=8, short=False),
)  # fmt: skip


def write_inputs(folder: Path, tiny: Tiny) -> None:
    draw, lines = random.Random(0), ["who,what,when,stars"]
    for user in range(300):
        for _ in range(draw.randint(3, 12)):
            when = 1_700_000_000 + draw.randrange(86_400 * 60)
            lines.append(f"{user},{int(40 * draw.random() ** 2)},{when},{draw.randint(1, 5)}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "log.yaml").write_text(CARD)
    (folder / "suite.yaml").write_text(tiny.text)


@dataclass
class Campaign:
    """What was tried and what was found. wrong: (suite, fault, turn, kind, what)."""

    base: Path
    seed: int
    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    fired: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[tuple[str, str, int, str, str]] = field(default_factory=list)
    whole: dict[str, tuple[Trial, Rows]] = field(default_factory=dict)
    read: defaultdict[str, Counter[str]] = field(default_factory=partial(defaultdict, Counter))
    nodes: Nodes = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = Nodes(self.base / "ray")

    def cluster(self) -> Nodes:
        """Of two nodes, begun when it is first asked for."""
        while len(self.nodes.marks) < 2:
            self.nodes.start()
        return self.nodes

    def add(self, other: Campaign) -> None:
        """What another has found too."""
        self.tried += other.tried
        self.fired += other.fired
        self.wrong += other.wrong
        for what, counts in other.read.items():
            self.read[what] += counts

    def hear(self, what: str, number: int, counts: Counter[str] | Exception) -> None:
        """What became of what strangers sent."""
        self.read[what] += (told := Counter([str(counts)]) if isinstance(counts, Exception) else counts)
        for bad in told.keys() - {"read", "refused"}:
            self.wrong.append(("", what, number, "stranger", bad))
            print(f"{what}, {number}: {bad[:2000]}\n", flush=True)

    def undisturbed(self, tiny: Tiny) -> tuple[Trial, Rows]:
        """A trial of the suite that nobody hurts, kept aside, and its rows. Raises AssertionError where it fails."""
        if tiny.name not in self.whole:
            trial = self.fresh(tiny, 0)
            began = time.perf_counter()
            ended = trial.run()
            trial.seconds = time.perf_counter() - began
            found = rows(trial.folder / "run")
            sound = ended.code == 0 and all(row["status"] == "ok" and not unmeasured(row) for row in found.values())
            assert sound, f"{tiny.name}: {ended}"
            trial.events = dict(zip(OPS, trial.counted()))
            trial.whole = self.base / f"whole-{tiny.name}"
            trial.folder.rename(trial.whole)
            self.whole[tiny.name] = trial, found
        return self.whole[tiny.name]

    def fresh(self, tiny: Tiny, turn: int) -> Trial:
        first = Path(__file__).parent / "bin", Path(sys.executable).parent  # the stand-ins, and what runs them
        path = os.pathsep.join([*map(str, first), os.environ["PATH"]])
        nodes = self.cluster() if "ray" in tiny.commands[0] else None
        words = [[word.format(out="{out}", address=self.nodes.address) for word in each] for each in tiny.commands]
        trial = Trial(self.base, words, seed=self.seed, turn=turn, more={"PATH": path}, nodes=nodes)
        shutil.rmtree(trial.folder, ignore_errors=True)
        trial.folder.mkdir()
        write_inputs(trial.folder, tiny)
        reporting(tiny.reports)
        return trial

    def once(self, tiny: Tiny, fault: Fault, turn: int) -> list[tuple[str, str]]:
        """Hurt a run, run it again; what was wrong."""
        model, want = self.undisturbed(tiny)
        trial = self.fresh(tiny, turn)
        trial.events, trial.seconds, trial.whole = model.events, model.seconds, model.whole
        trial.draw = random.Random(f"{self.seed} {tiny.name} {fault.name} {turn}")
        ended = fault.hurt(trial)
        found = [each for one in ended for each in after_the_hurt(fault, trial, one, want)]
        before = kept(trial)
        trial.commands = (*trial.commands, ("verify", "run"))
        spoilt = [name for one in ended for name in one.spoilt]
        found += after_the_next(fault, trial, trial.run(), before, want, spoilt)
        self.tried[tiny.name, fault.name] += 1
        self.fired[tiny.name, fault.name] += any(one.fired for one in ended)
        self.wrong += [(tiny.name, fault.name, turn, *each) for each in found]
        return found


# ---- what is read of strangers


def hostile(what: str, seed: int, base: Path) -> Counter[str]:
    """What became of some damaged packed states, data files, or suites and cards: read, refused, or what is wrong."""
    (folder := base / "hostile").mkdir(exist_ok=True)
    os.environ["MALLOC_BENCH_HOME"] = str(folder / "home")
    for descriptor in (1, 2):  # warnings of what was read all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    if what == "packed states":
        import test_unpack

        return test_unpack.fuzz(200, seed)
    if what == "data files":
        import test_fuzz_data

        return Counter(test_fuzz_data.outcome(200 * seed + i, folder) for i in range(200))
    import test_fuzz_suites

    from malloc_bench.run import runner

    runner.probed = lambda *plan: None
    return test_fuzz_suites.fuzz(seed, 60, folder)


HOSTILE = ("packed states", "data files", "suites and cards")


# ---- the command


def pairs(short: bool, seed: int) -> Iterator[tuple[Tiny, Fault, int]]:
    """(suite, fault, turn) without end: rounds of all faults, each on a suite that is drawn, dear ones more seldom."""
    turns: Counter[tuple[str, str]] = Counter()
    known = [tiny for tiny in SUITES if tiny.short or not short]
    if not importlib.util.find_spec("ray"):
        known = [tiny for tiny in known if tiny.name != "ray"]
    for around in itertools.count():
        draw = random.Random(f"{seed} {around}")
        due = [fault for place, fault in enumerate(FAULTS) if (around + place) % fault.seldom == 0]
        often = [fault.often for fault in due]
        for fault in draw.sample(due, sum(often), counts=often):
            fit = [tiny for tiny in known if (tiny.name in fault.suites if fault.suites else tiny.name != "redis")]
            if fit:
                (tiny,) = draw.choices(fit, [1 / each.weight for each in fit])
                yield tiny, fault, turns[tiny.name, fault.name]
                turns[tiny.name, fault.name] += 1


def table(found: Campaign) -> str:
    """What was done, how often, and what came of it, as markdown."""
    lines = ["| what was done | suites | trials | came to it | wrong |", "| :-- | --: | --: | --: | --: |"]
    for fault in FAULTS:
        mine = [key for key in found.tried if key[1] == fault.name]
        counts = [sum(each[key] for key in mine) for each in (found.tried, found.fired)]
        wrong = sum(each[1] == fault.name for each in found.wrong)
        if mine:
            lines.append(f"| {fault.name} | {len(mine)} | {counts[0]:,} | {counts[1]:,} | {wrong} |")
    deadly = {fault.name for fault in FAULTS if fault.kills}
    for name, among in (("all", {fault.name for fault in FAULTS}), ("of these, kills", deadly)):
        tried, fired = (
            sum(n for (_, fault), n in each.items() if fault in among) for each in (found.tried, found.fired)
        )
        wrong = sum(each[1] in among for each in found.wrong)
        lines.append(f"| **{name}** | | **{tried:,}** | **{fired:,}** | **{wrong}** |")
    lines += ["", "| what was read of strangers | tried | refused | read | wrong |", "| :-- | --: | --: | --: | --: |"]
    for what, counts in found.read.items():
        bad = counts.total() - counts["refused"] - counts["read"]
        lines.append(f"| {what} | {counts.total():,} | {counts['refused']:,} | {counts['read']:,} | {bad} |")
    kinds = ("lost", "silently lost", "changed", "silently wrong", "traceback", "leftovers", "hung")
    said = Counter(kind for *_, kind, _ in found.wrong)
    other = len(found.wrong) - sum(said[kind] for kind in kinds)
    lines += ["", ", ".join(f"{kind}: {said[kind]}" for kind in kinds) + f", anything else: {other}."]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """The text between the two marks of a page."""
    before, rest = path.read_text().split(BEGINS)
    path.write_text(f"{before}{BEGINS}\n\n{text}\n\n{ENDS}{rest.split(ENDS)[1]}")


BEGINS, ENDS = "<!-- campaign -->", "<!-- /campaign -->"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--trials", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="suite/fault/turn, or the start of it: one trial again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time")
    parser.add_argument("--short", action="store_true", help="no suite that takes seconds, no strangers")
    parser.add_argument("--write", type=Path, help="a page between whose marks the table goes")
    return parser.parse_args()


def restarted() -> int | None:
    """This again, with the shim and one thread, and its exit code; None where both are there."""
    if "FAULT_SHIM" in os.environ:
        return None
    with tempfile.TemporaryDirectory(prefix="faults-shim-") as folder:
        made = shim(Path(folder))
        if made is None:
            print("there is no C compiler (cc, gcc, clang), which shim.c needs", file=sys.stderr)
            return 2
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
        more = {"LD_PRELOAD": str(made), "FAULT_SHIM": str(made), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | one | more).returncode


def share(asked: argparse.Namespace, base: Path, job: int, until: float) -> Campaign:
    """Every `asked.jobs`-th trial, one after another."""
    base.mkdir()
    found = Campaign(base, asked.seed)
    with contextlib.closing(found.nodes):
        for number, (tiny, fault, turn) in enumerate(pairs(asked.short, asked.seed)):
            if number >= asked.trials or time.monotonic() > until:
                break
            name = f"{tiny.name}/{fault.name}/{turn}"
            if number % asked.jobs == job and name.startswith(asked.only):
                for kind, what in found.once(tiny, fault, turn):
                    print(f"{name}: {kind}: {what}\n", flush=True)
            if name == asked.only:
                break
            if number % (len(FAULTS) * asked.jobs) == job and not (asked.short or asked.only):
                for what in HOSTILE:
                    found.hear(what, number, forked(hostile, what, asked.seed + number, base)())
    found.whole = {}
    return found


def main() -> int:
    asked = arguments()
    if (code := restarted()) is not None:
        return code
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        first = Campaign(Path(folder), asked.seed)
        preload(first.fresh(tiny, 0) for tiny in SUITES if tiny.name in ("times", "tuned", "structural"))
        until = began + 60 * asked.minutes
        shares = [forked(share, asked, first.base / str(job), job, until) for job in range(asked.jobs)]
        found = Campaign(first.base, asked.seed)
        for result in shares:
            if isinstance(told := result(), Exception):
                raise told
            found.add(told)
    text = (
        f"{(time.monotonic() - began) / 60:.0f} minutes, {asked.jobs} at a time, seed {asked.seed}.\n\n{table(found)}"
    )
    print(text)
    if asked.write:
        write(asked.write, text)
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
