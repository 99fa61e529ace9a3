"""The commands: a thin layer over the library. What is imported here is imported before `--help` answers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from malloc_bench.cli.arguments import Device, DryRun, MethodArg, Only, Out, Quiet, RunArg, SuiteArg, pairs, run_folder
from malloc_bench.cli.arguments import shard as parse_shard
from malloc_bench.cli.data import NameArg, Offline, data
from malloc_bench.cli.ending import end_as_by_ctrl_c
from malloc_bench.cli.machines import machines
from malloc_bench.cli.plan import plans
from malloc_bench.cli.reports import reports
from malloc_bench.cli.text import console, grid, listing, plain, say, say_json, set_up, shown
from malloc_bench.paths import home
from malloc_bench.registry import clipped, in_a_line, load_part

if TYPE_CHECKING:
    from polars import DataFrame

    from malloc_bench.suite.plan import RunResult

app = typer.Typer(
    help="How small can a recommender's user state get before recommendations suffer? Measured.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data, name="data")
app.add_typer(reports)
app.add_typer(plans)
app.add_typer(machines)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the work; times are measured by one alone.")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    use: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="file.py:Class of your own, that suites may then name; repeat for more."),
    ] = None,
) -> None:
    for each in use or ():
        load_part(each)
    if version:
        import malloc_bench

        say(malloc_bench.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    suite: SuiteArg,
    out: Out = None,
    only: Only = None,
    dry_run: DryRun = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run cells again that are done; checkpoints are kept.")
    ] = False,
    offline: Offline = False,
    device: Device = "auto",
    quiet: Quiet = False,
    tuned: Annotated[Path | None, typer.Option(help="Parameters that `tune` chose: a tuned.yaml.")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: the I-th of N parts, for many machines; then merge.")] = None,
    workers: Workers = 1,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Who works: this machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="The Ray cluster's: HOST:PORT; the one of this machine.")] = None,
) -> int:
    """Run a suite and print its leaderboard; run again, it goes on where it was and retries what failed."""
    from malloc_bench.run import runner

    part = None if shard is None else parse_shard(shard)
    chosen = pairs(only or [])
    result = runner.run_suite(
        suite, out, only=chosen, dry_run=dry_run, fresh=fresh, offline=offline, device=device, quiet=quiet,
        tuned=tuned, shard=part, workers=workers, executor=executor, address=address,
    )  # fmt: skip
    (_plan if dry_run else _finish)(result, quiet)
    return result.exit_code


@app.command()
def tune(
    suite: SuiteArg,
    out: Out = None,
    only: Only = None,
    metric: Annotated[str | None, typer.Option(help="What is best; overlap@10, or agreement, by default.")] = None,
    per_budget: Annotated[bool, typer.Option("--per-budget", help="Choose for each budget by itself.")] = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    device: Device = "auto",
    quiet: Quiet = False,
    workers: Workers = 1,
) -> int:
    """Choose the parameters of a suite's methods on validation users, and write tuned.yaml for `run --tuned`."""
    from malloc_bench.results import label
    from malloc_bench.run import tune as tuning

    found = tuning.tune(
        suite, out, metric=metric, per_budget=per_budget, only=pairs(only or []), dry_run=dry_run, offline=offline,
        device=device, quiet=quiet, workers=workers,
    )  # fmt: skip
    if found.path is None:
        _plan(found.result, quiet)
        return 0
    for each in found.chosen if not quiet else ():
        at = f" at {each.budget}" if each.budget else ""
        where = f"{each.dataset}, {each.task}, {each.backbone}, {each.compressor}{at}"
        ((name, params),) = each.use.items()
        say(f"{where}: {label(name, json.dumps(params))}, {each.score:.4f} ({each.default:.4f} as it was)")
    better = sum(each.score > each.default for each in found.chosen)
    say(f"{len(found.chosen)} chosen, {better} better than as they were: malloc-bench run {suite} --tuned {found.path}")
    return found.result.exit_code


@app.command()
def compare(
    method: Annotated[
        str, typer.Argument(metavar="METHOD|RUN", help="A class: file.py:Class or module:Class; or a run.")
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A second run to hold beside the first.")
    ] = None,
    suite: Annotated[str, typer.Option(help="The suite to measure it on.")] = "quick",
    against: Annotated[str, typer.Option(help="Compressors beside it: a,b.")] = "recent,random",
    out: Out = None,
    only: Only = None,
    dry_run: DryRun = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run cells again that are done.")] = False,
    device: Device = "auto",
) -> int:
    """Your own compressor against named baselines: a verdict, paired over users; or one run against another."""
    if other is not None:
        from malloc_bench.report.two_runs import print_two_runs, two_runs

        found = two_runs(run_folder(method), run_folder(str(other)), pairs(only or []))
        print_two_runs(found, console())
        return 0
    from malloc_bench.report import verdict
    from malloc_bench.run import runner

    names = [name.strip() for name in against.split(",") if name.strip()]
    result = runner.compare(
        method, suite, names, out, only=pairs(only or []), dry_run=dry_run, fresh=fresh, device=device
    )
    if dry_run:
        _plan(result, quiet=False)
        return 0
    _finish(result, quiet=False)
    for own in {each.cell.compressor.name for each in result.plan} - {"full", "none", *names}:
        verdict.print_verdict(verdict.verdict(_asked(result), result.folder, own, ["none", *names]), console())
    return result.exit_code


@app.command("list")
def list_(
    kind: Annotated[Literal["datasets", "backbones", "compressors", "suites"], typer.Argument()],
    words: Annotated[list[str] | None, typer.Argument(help="Only what has them all: amazon-2023, eviction.")] = None,
    as_json: AsJson = False,
) -> None:
    """What there is of a kind."""
    from malloc_bench.cli import describe

    heads, rows = describe.listing(kind, words or [], grouped=console().is_terminal and not as_json)
    if as_json:
        say_json([dict(zip(heads, row)) for row in rows])
    else:
        listing(heads, rows)


@app.command()
def show(
    name: NameArg,
    as_json: AsJson = False,
    run: Annotated[
        Path | None, typer.Option(help="A run: what its fits make of each budget (auto).", parser=run_folder)
    ] = None,
    only: Only = None,
) -> None:
    """A compressor, backbone, data set or suite: what it is, where it comes from, its parameters."""
    from malloc_bench.cli import describe

    found = describe.show(name) if run is None else describe.explained(name, run, pairs(only or []))
    if as_json:
        say_json([{"name": name, "kind": kind, "lines": [list(line) for line in lines]} for kind, lines in found])
        return
    on = console()
    for kind, lines in found:
        on.print(shown(f"{name} ({kind})"), style="bold", markup=False, highlight=False)
        grid(lines, on)


@app.command()
def reproduce(
    run: RunArg,
    cell: Annotated[str, typer.Argument(help="The start of a cell's id, or compressor=snapkv,budget=0.25.")],
) -> int:
    """Run one cell of a run again and say what differs."""
    from malloc_bench.run import runner
    from malloc_bench.suite.cells import Cell

    row = runner.one_row(run, pairs([cell]) if "=" in cell else cell)
    differing = runner.reproduce(run, row["cell_id"])
    say(f"{row['cell_id'][:12]}: {Cell.of_row(row)}")
    say("\n".join(f"differs: {line}" for line in differing) or "reproduced: bytes and every measure of accuracy agree")
    return 1 if differing else 0


@app.command()
def check(method: MethodArg) -> int:
    """Hold your own compressor or backbone against every promise that one makes."""
    from malloc_bench import testing
    from malloc_bench.registry import load_class, told

    broken, checks = 0, testing.part_checks(load_class(method))
    for each in checks:
        try:
            each()
        except Exception as error:  # whatever it is, a promise is broken
            broken += 1
            say(f"broken: {each}: {told(error)}")
    say(f"{len(checks) - broken} of {len(checks)} promises kept")
    return 1 if broken else 0


@app.command()
def env() -> None:
    """Print what is recorded of this machine."""
    from malloc_bench.measure import environment

    grid([(key, plain(value)) for key, value in environment().items()])


def main(arguments: list[str] | None = None) -> int:
    """The entry point: an exit code, and one line on stderr for whatever the user can mend.

    0 all well, 1 some cells failed or something differs, 2 the suite, an argument or the folder is wrong, 130
    interrupted, 143 ended by SIGTERM.
    """
    # threads that wait spin for some microseconds only: spinning on makes two runs beside each other 3 times slower,
    # sleeping at once makes a run alone a quarter slower
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    set_up()
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    ended: list[int] = []  # by a signal that asks to end
    try:
        end_as_by_ctrl_c(ended)
        code = app(args=[word for word in words if word != "--debug"], prog_name="malloc-bench", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of a pipe has gone
        with contextlib.suppress(OSError):
            sys.stdout = open("/dev/null", "w")  # noqa: PTH123, SIM115
        return 1
    except Exception as error:
        if debug or not _expected(error):
            raise
        code = _refuse(_message(error).replace("Value error, ", ""))
    else:
        code = code or 0
    if code == 130:
        code = 128 + ended[0] if ended else 130
        named = (word for before, word in zip(["", *words], words) if word[:1] != "-" and before != "--use")
        runs = next(named, "") in ("run", "tune", "compare")
        kept = "; finished cells are kept, run again to go on" if runs else ""
        say(f"malloc-bench: interrupted{kept}", err=True)
    return code


def _expected(error: Exception) -> bool:
    """Whether the message says all that the user needs: SuiteError, DataError, UnknownName, a bad argument ..."""
    # by name: their modules take seconds to import
    ours = {"DataError", "ResultsError", "LockedError", "StoreError", "WorkerError"}
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, ValueError | OSError) or hasattr(error, "format_message") or bool(names & ours)


def _message(error: Exception) -> str:
    text = str(error.format_message()) if hasattr(error, "format_message") else in_a_line(error)
    ours = str(home()) in text and "MALLOC_BENCH_HOME" not in text
    return f"{text} (MALLOC_BENCH_HOME names the folder of the cache)" if ours else text


def _refuse(message: str) -> int:
    words = (word if len(word) < 1000 else clipped(word) for word in message.split())  # no path is as long
    say(f"malloc-bench: {' '.join(words)}", err=True)
    return 2


def _plan(result: RunResult, quiet: bool) -> None:
    """The cells, which of them are done, and how long the others may take."""
    from malloc_bench.run.progress import PHASES, duration

    if not quiet:
        for each in result.plan:
            why = f" ({each.cell.impossible})" if each.cell.impossible and each.cell.data else ""
            word = "done" if each.done else "skip" if each.cell.impossible else "run "
            say(f"{word}  {each.id[:12]}  {each.cell}{why}")
    left = sum(not each.done and not each.cell.impossible for each in result.plan)
    skipped = len(result.plan) - result.reused - left
    also = f"{skipped} skipped, " if skipped else ""
    if result.probe is None:
        how = f"very roughly {duration(result.estimate)} on 2 cores"
    else:
        costs = result.costs.values()
        train, judge, drift, timing = (sum(getattr(c, k) for c in costs) for k in PHASES)
        parts = f"training at most {duration(train)}, evaluation {duration(judge)}, "
        parts += f"drift {duration(drift)}, " if drift else ""
        parts += f"measuring {duration(timing)}"
        how = f"about {duration(result.estimate)} here ({parts}; probed for {duration(result.probe)})"
    say(f"{len(result.plan)} cells: {result.reused} done, {also}{left} to run: {how}")


def _finish(result: RunResult, quiet: bool) -> None:
    """The leaderboard of the cells that were asked for, what became of them, and where the files are."""
    if not quiet:
        from malloc_bench.report.leaderboard import print_leaderboard

        print_leaderboard(_asked(result), console(), result.folder)
    counts = f"{result.ok} ok, {result.skipped} skipped, {result.failed} failed, {result.reused} done before"
    words = {"train": "training", "evaluate": "evaluation", "drift": "drift", "measure": "measuring"}
    spent = ", ".join(f"{words[part]} {seconds:.0f}" for part, seconds in result.times.items() if seconds >= 0.5)
    took = f"{result.seconds:.0f} s{f' ({spent})' if spent else ''}"
    say(f"{counts}, in {took}: {result.folder}/leaderboard.md, results.parquet, figures/")


def _asked(result: RunResult) -> DataFrame:
    """The rows of the cells that were asked for."""
    import polars as pl

    from malloc_bench.results import load_results

    return load_results(result.folder).filter(pl.col("cell_id").is_in([each.id for each in result.plan]))
