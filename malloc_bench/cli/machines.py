"""Commands for more than one process or machine: train with torchrun, hand shards in to Slurm."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

import typer

from malloc_bench.cli.arguments import Device, Only, Out, Quiet, SuiteArg, pairs
from malloc_bench.cli.data import Offline
from malloc_bench.cli.text import say

machines = typer.Typer()
BESIDE = {"out": "give --out before the --", "shard": "give --tasks before the --"}


@machines.command()
def train(
    suite: SuiteArg, only: Only = None, offline: Offline = False, device: Device = "auto", quiet: Quiet = False
) -> None:
    """Train a suite's backbones ahead, into the cache where `run` finds them; by N processes under torchrun."""
    from malloc_bench.run.train import train

    for cell, fit in train(suite, only=pairs(only or []), offline=offline, device=device, quiet=quiet):
        score = fit.best_ndcg if fit.best_auc is None else fit.best_auc
        best = "" if score is None else f", best validation {'NDCG@10' if fit.best_auc is None else 'AUC'} {score:.4f}"
        own = f" for {cell.compressor.label}" if cell.compressor.structural else ""
        where = f"{cell.dataset}, {cell.backbone.label}, seed {cell.seed}{own}"
        say(f"{where}: {fit.epochs} epochs in {fit.seconds:.0f} s{best}; weights {(fit.weights or '')[:12]}")


@machines.command()
def submit(
    context: typer.Context,
    suite: SuiteArg,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="More options of `run`, behind --.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Shards, each a job of one array.")] = 1,
    out: Out = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A job's: timeout_min=600, slurm_partition=gpu, mem_gb=32 ..."),
    ] = None,
    cluster: Annotated[Literal["slurm", "local"], typer.Option(help="Whose; local: this machine, to try.")] = "slurm",
) -> None:
    """Hand a suite in to Slurm: an array of `run SUITE --shard i/N`; the command that merges them is printed."""
    from malloc_bench.run.submit import submit

    chosen = {}
    for each in settings or ():
        key, given, value = each.partition("=")
        if not (key and given and value):
            raise ValueError(f"--set {each}: expected KEY=VALUE, as in timeout_min=600")
        chosen[key] = int(value) if value.isdecimal() else value
    _try(context, suite, tasks, options or [])
    jobs, parts = submit(suite, tasks, out, chosen, options or (), cluster)
    whole = str(parts[0]).removesuffix(f"-1of{tasks}")
    say(f"{len(jobs)} jobs: {', '.join(job.job_id for job in jobs)}; what they say is in {whole}-jobs")
    say(f"when they are done: malloc-bench merge {shlex.join(map(str, parts))} --out {shlex.quote(whole)}")


def _try(context: typer.Context, suite: str, tasks: int, options: list[str]) -> None:
    """Read the options as each job's `run` will, which would only say it in its log."""
    from typer.core import TyperGroup

    from malloc_bench.suite import suite as suites

    group = context.find_root().command
    assert isinstance(group, TyperGroup)
    given = group.commands["run"].make_context("run", [suite, *options]).params
    for name in ("out", "shard"):
        if given[name] is not None:
            raise ValueError(f"--{name} {given[name]} behind --: each job has its own; {BESIDE[name]}")
    left = len(suites.only(suites.load_suite(suite).cells(), pairs(given["only"] or [])))
    if given["only"] and tasks > left:
        raise ValueError(f"--tasks {tasks}: {left} cells have what --only asks for, expected at most as many tasks")
