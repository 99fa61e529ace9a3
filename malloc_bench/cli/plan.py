"""`malloc-bench plan`: a run's measured costs as a fleet of machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from malloc_bench.cli.arguments import Only, RunArg, pairs
from malloc_bench.cli.text import console, say
from malloc_bench.registry import literal

if TYPE_CHECKING:
    import polars as pl

    from malloc_bench.measure.fleet import Costs, Fleet, Plan, Prices, Slopes

plans = typer.Typer()

KEEPS_IDS = "recompute"
NEAR = 0.05  # of a length: what is no nearer than that to a measured one is extrapolated; costs are as noisy
WHY = (
    "Machines: whole ones, with states in RAM or on SSD, as many as memory or cores need. Pays from: requests per user "
    "and day from which on keeping this state is never dearer than keeping ids and rebuilding the state for each read, "
    "{unit}.",
    "Not counted: bytes that all users share, copies against failures, the network, what an SSD takes to answer.",
)


@plans.command()
def plan(
    run: RunArg,
    users: Annotated[float, typer.Option(help="Users with a state: 1e9.")],
    events: Annotated[float, typer.Option(help="Events of each user's history.")],
    requests_per_second: Annotated[float, typer.Option(help="Of all users together.")],
    appends_per_second: Annotated[float, typer.Option(help="New events of all users together.")],
    prices: Annotated[Path | None, typer.Option(help="A YAML file, as examples/prices_made_up.yaml.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Of a request; one of those that were measured.")] = None,
    only: Only = None,
    out: Annotated[Path | None, typer.Option(help="Where figures go; the run's figures/ by default.")] = None,
    cores_per_machine: Annotated[float, typer.Option()] = 64.0,
    ram_gb_per_machine: Annotated[float, typer.Option(help="For states; a GB is 1e9 bytes.")] = 512.0,
    ssd_gb_per_machine: Annotated[float, typer.Option(help="For states.")] = 8000.0,
    utilisation: Annotated[float, typer.Option(help="Share of a core's time that is work.")] = 0.5,
    rebuild_every: Annotated[
        float, typer.Option(help="Appended events after which a state is compressed again.")
    ] = 100.0,
) -> None:
    """What each method of a run comes to for a fleet: bytes, cores, machines, money; and when keeping a state pays."""
    from malloc_bench.measure.fleet import Fleet, read_prices

    fleet = Fleet(
        users, events, requests_per_second, appends_per_second, cores_per_machine, ram_gb_per_machine,
        ssd_gb_per_machine, utilisation, rebuild_every,
    )  # fmt: skip
    paid = None if prices is None else read_prices(prices)
    for line in printed(run, fleet, paid, prices, candidates, pairs(only or []), out or run / "figures"):
        say(line)


def printed(
    run: Path,
    fleet: Fleet,
    prices: Prices | None,
    named: Path | None,
    candidates: int | None,
    only: dict[str, list[str]],
    out: Path,
) -> Iterator[str]:
    """Print a table a data set, task, split and backbone; the lines that follow. Raises ValueError."""
    import polars as pl

    from malloc_bench.measure.fleet import Plan, at_candidates, costs, slopes
    from malloc_bench.report.board import aggregate, groups_of, of_seeds, select, title
    from malloc_bench.report.figures import file_stems
    from malloc_bench.report.judge import deployable
    from malloc_bench.report.render import filled, tell, terminal
    from malloc_bench.results import frame, load_results

    rows = of_seeds(load_results(run), only)
    also: tuple[str, ...] = ()
    if candidates is not None:
        asked = at_candidates(rows.to_dicts(), candidates)
        also = ("batch_candidates",)  # of which the schema of rows knows nothing
        rows = frame(asked).with_columns(
            pl.Series(name, [each.get(name) for each in asked], pl.Float64) for name in also
        )
    on, missing, written = console(), 0, []
    every = dict(groups_of(aggregate(rows, also).filter(deployable())))
    stems = file_stems({key: [title(group.row(0, named=True))] for key, group in every.items()})
    for key, group in groups_of(select(rows, only, also).filter(deployable())):
        head = title(group.row(0, named=True))
        moved = slopes(whole := every[key].to_dicts())
        found = ((row, costs(row, fleet.events, moved.get(row["compressor"]))) for row in group.to_dicts())
        measured = [(row, Plan(fleet, one)) for row, one in found if one]
        missing += len(group) - len(measured)
        if not measured:
            continue
        ids = Plan(fleet, _ids(whole, moved, fleet.events, head))
        if ids not in [each for _, each in measured]:
            measured.append(({"compressor": ids.costs.method}, ids))
        table = _table(measured, ids, prices)
        beyond = ": EXTRAPOLATED" if _beyond([row for row, _ in measured], fleet.events) else ""
        on.print(terminal(table, filled(table, _columns()), head + beyond, on.width))
        for line in _said([row for row, _ in measured], [each for _, each in measured], ids):
            tell(on, line)
        on.print()
        better = sorted(measured, key=lambda pair: -(pair[0].get("overlap@10") or pair[0].get("agreement") or 0.0))
        written += _drawn(better, ids, prices, head, out / f"fleet-{stems[key]}")
    if not written:
        raise ValueError(
            f"{run} has no measured costs: run its suite with measure: {{latency: true}}, which is the default, again"
        )
    yield from _assumed(fleet, named, missing)
    yield from map(str, written)


def _ids(rows: list[dict[str, Any]], moved: Mapping[str, Slopes], events: float, head: str) -> Costs:
    """Of keeping ids and rebuilding the state for every read: as measured, or made up of the full state's costs."""
    from malloc_bench.measure.fleet import costs, rebuilt

    by = {row["method"]: row for row in rows}
    ids = by.get(KEEPS_IDS)
    found = None if ids is None else costs(ids, events, moved.get(ids["compressor"]))
    found = found or (rebuilt(by["full"], events) if "full" in by else None)
    if found is None:
        raise ValueError(
            f"{head}: neither recompute nor full was measured: there is nothing to hold a kept state against"
        )
    return found


def _table(plans: list[tuple[dict[str, Any], Plan]], ids: Plan, prices: Prices | None) -> pl.DataFrame:
    import polars as pl

    from malloc_bench.measure.fleet import break_even

    found = []
    for row, each in plans:
        line: dict[str, Any] = {
            "compressor": row["compressor"],
            "budget": row.get("budget"),
            "overlap@10": row.get("overlap@10"),
            "agreement": row.get("agreement"),
            "bytes": each.costs.bytes,
            "total": each.bytes,
            "cores": each.cores,
            "build": each.build_core_hours,
            "read": each.costs.read,
        }
        for memory in ("ram", "ssd"):
            lines = each.in_machines(memory) if prices is None else each.in_usd(prices, memory)
            theirs = ids.in_machines(memory) if prices is None else ids.in_usd(prices, memory)
            even = break_even(lines, theirs)
            line[f"machines_{memory}"] = float(each.machines(memory))
            line[f"usd_{memory}"] = None if prices is None else each.usd_month(prices, memory)
            line[f"kwh_{memory}"] = None if prices is None else each.kwh_month(prices, memory)
            line[f"pays_{memory}"] = None if each.costs.raw else _pays(even)
        found.append(line)
    kinds = dict.fromkeys(("compressor", "budget", "pays_ram", "pays_ssd"), pl.String)
    names = {name: kinds.get(name, pl.Float64) for name in found[0]}
    return pl.DataFrame(found, schema=names).sort("usd_ram" if prices else "machines_ram", "cores")


def _pays(even: float | None) -> str:
    from malloc_bench.report.render import three_digits

    return "never" if even is None else "always" if even == 0 else three_digits(even)


def _columns() -> list[Any]:
    from malloc_bench.report.render import number, significant, words

    return [
        words("compressor", "compressor"),
        words("budget", "budget"),
        number("overlap@10", "overlap@10", ".3f", rank=1),
        number("agreement", "agreement", ".3f", rank=1),
        significant("bytes", "state (KB/user)", rank=3, scale=1e-3),
        significant("total", "states (TB)", scale=1e-12),
        significant("read", "request (ms)", rank=3),
        significant("cores", "cores"),
        number("machines_ram", "machines (RAM)", ",.0f"),
        number("machines_ssd", "machines (SSD)", ",.0f", rank=2),
        significant("usd_ram", "USD a month (RAM)"),
        significant("usd_ssd", "USD a month (SSD)", rank=2),
        significant("kwh_ram", "MWh a month (RAM)", rank=5, scale=1e-3),
        significant("kwh_ssd", "MWh a month (SSD)", rank=6, scale=1e-3),
        words("pays_ram", "pays from (RAM)", rank=1),
        words("pays_ssd", "pays from (SSD)", rank=2),
        significant("build", "to build (core hours)", rank=7),
    ]


def _beyond(rows: list[dict[str, Any]], events: float) -> str:
    """How far a length lies from those that all were measured at, in words; nothing where it is as good as one."""
    lengths = [(n, row["measured_history_long"]) for row in rows if (n := row.get("measured_history"))]
    n, most = max(n for n, _ in lengths), min(most or n for n, most in lengths)
    if n * (1 - NEAR) <= events <= most * (1 + NEAR):
        return ""
    return f"{events / most:.3g} times the longest" if events > most else f"{events / n:.3g} times the shorter"


def _said(rows: list[dict[str, Any]], plans: list[Plan], ids: Plan) -> Iterator[str]:
    """What a section's numbers were measured at, and what follows of it."""
    row = rows[0]
    events, by = ids.fleet.events, sum(each.costs.by_request for each in plans)
    n, most, many = row["measured_history"], row["measured_history_long"], row["measured_candidates"]
    most = most or n
    line = f"Measured at {n:,} and {most:,} events, {row['measured_users']} users a batch, {many} candidates a read, "
    line += "CPU time of one thread"
    line += f"; requests of {by} methods one user at a time through {row['store']}, wall time" if by else ""
    yield f"{line}."
    if beyond := _beyond(rows, events):
        yield (
            f"EXTRAPOLATED to {events:,.0f} events, {beyond} that was measured (beyond {NEAR:.0%} it is called so): "
            "bytes along the line through both lengths (of a share in proportion), times by FLOPs where they were "
            "counted; overlap and agreement are of the run's users."
        )
    growths = {each.costs.method: each.costs.growth for each in plans}
    constant = [method for method, growth in growths.items() if growth.startswith("constant")]
    linear = [f"{method} {growths[method]}" for method in ("full", ids.costs.method) if method in growths]
    yield f"Bytes: {', '.join(linear)}" + (f"; constant: {', '.join(constant)}." if constant else ".")
    if wrong := sum(each.get("timing") not in (None, "ok") for each in rows):
        yield f"TIMES of {wrong} of {len(rows)} methods are of a busy machine, or vary: measure again on a quiet one."
    if ids.costs.method != KEEPS_IDS:
        yield "The run has no recompute: it is made up of the full state's prefill and read."


def _assumed(fleet: Fleet, prices: Path | None, missing: int) -> Iterator[str]:
    each = 86_400 / fleet.users
    yield (
        f"Asked: {fleet.users:g} users of {fleet.events:g} events, {fleet.requests_per_second:g} requests and "
        f"{fleet.appends_per_second:g} new events a second: {fleet.requests_per_second * each:.3g} and "
        f"{fleet.appends_per_second * each:.3g} per user and day."
    )
    yield (
        f"Assumed: machines of {fleet.cores_per_machine:g} cores with {fleet.ram_gb_per_machine:g} GB of RAM or "
        f"{fleet.ssd_gb_per_machine:g} GB of SSD for states (1 GB = 1e9 bytes), cores at work {fleet.utilisation:.0%} "
        f"of the time; states compressed again, prefill and all, after {fleet.rebuild_every:g} new events of a user "
        "(full, none and raw ids never); one more byte takes to load, unpack, pack and write what it does between a "
        "method's own budgets, or from none to full; a month of 730 hours."
    )
    yield f"Prices: {prices}." if prices is not None else "No prices were given: bytes, cores and machines only."
    if missing:
        yield f"{missing} methods have no measured costs and are left out."
    yield from (line.format(unit="in USD" if prices else "in machines") for line in WHY)


def _drawn(
    plans: list[tuple[dict[str, Any], Plan]], ids: Plan, prices: Prices | None, head: str, stem: Path
) -> list[Path]:
    from malloc_bench.measure.fleet.sweep import sweep
    from malloc_bench.report.break_even import break_even_figure
    from malloc_bench.report.figures import written
    from malloc_bench.report.judge import REBUILT
    from malloc_bench.report.lines import WIDTHS, Curve

    def paid(each: Plan) -> Any:
        return each.in_machines("ram") if prices is None else each.in_usd(prices, "ram")

    families = {literal(each.costs.method): row["family"] for row, each in plans if not each.costs.raw}
    asked = ids.fleet.requests_per_second * 86_400 / ids.fleet.users
    found = sweep({literal(each.costs.method): paid(each) for _, each in plans if not each.costs.raw}, paid(ids), asked)
    curves = [Curve(literal(ids.costs.method), REBUILT, found.asked, found.rebuilt)]
    curves += [Curve(method, families[method], found.asked, cost) for method, cost in found.paid.items()]
    unit = "machines, states in RAM" if prices is None else "USD a month, states in RAM"
    paths = []
    for end, width in WIDTHS.items():
        figure = break_even_figure(curves, found.evens, asked, unit, literal(head), width)
        paths += [written(figure, stem.with_name(f"{stem.name}{end}.{suffix}")) for suffix in ("svg", "png")]
    return paths
