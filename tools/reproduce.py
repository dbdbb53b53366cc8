#!/usr/bin/env python
"""Reproduce tables of the papers: show what they cost, train and evaluate their rows, print ours beside the papers'.

Without --run, --submit, or --collect it only shows what there is to do. A finished run is not trained again, and an
interrupted one resumes. Runs are in OUTPUT/DATASET/ROW, with tables and charts beside them.
"""

import argparse
import logging
import shlex
from pathlib import Path

from dimaskdino.command_line import at_least
from dimaskdino.errors import UserError, run_cli
from dimaskdino.reproduction.tables import DATASETS, Table, choose_tables, find_experiment, paper_tables

EXAMPLES = """
  what there is to do   tools/reproduce.py table4 --dataset bdd100k
  what it would cost    tools/reproduce.py all --measure 20 --num-gpus 8
  on this machine       tools/reproduce.py table4 --dataset bdd100k --run --num-gpus 8
  mean of three runs    tools/reproduce.py table4 --dataset bdd100k --run --num-gpus 8 --seeds 3
  effects of DI, BATO   tools/reproduce.py interaction --dataset bdd100k --run --num-gpus 8 --seeds 3
  on a cluster          tools/reproduce.py table4 --dataset bdd100k --submit slurm --num-gpus 8 --slurm timeout_min=2880
  what is there so far  tools/reproduce.py table4 --dataset bdd100k --collect
  on a laptop           tools/reproduce.py table4 --dataset shapes --run
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*paper_tables(), "all"]
    parser.add_argument("tables", nargs="+", choices=names, metavar="TABLE", help=f"{', '.join(names)}")
    parser.add_argument(
        "--dataset", action="append", choices=DATASETS, help="may be given several times; default: those of the paper"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--run", action="store_true", help="train and evaluate what is missing, then collect")
    action.add_argument("--submit", choices=["slurm"], help="send what is missing to a cluster, a job for each run")
    action.add_argument("--collect", action="store_true", help="only print the tables from the runs that are there")
    action.add_argument("--dry-run", action="store_true", help="only show what there is to do and its cost (default)")
    parser.add_argument(
        "--measure", type=int, metavar="N", help="first train N iterations of each kind of run to find the hours"
    )
    parser.add_argument(
        "--seeds", type=at_least(1), metavar="N", help="train each row with SEED 1 to N; print the mean"
    )
    parser.add_argument("--num-gpus", type=at_least(0), help="as for train_net.py; 0 means the CPU")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), help="folder of all runs and tables")
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's parameters; timeout_min is required"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY VALUE", help="keys on top of every configuration file"
    )
    parser.add_argument("--verbose", action="store_true", help="also show the command of every run")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.reproduction.charts import StageResults, draw_imbalance, draw_table
from dimaskdino.reproduction.costs import cost_table, measure_folder, speeds
from dimaskdino.reproduction.effects import ap_interval, effects, effects_csv, effects_markdown
from dimaskdino.reproduction.jobs import Job, Launcher, check_submission, measure_all, run_jobs, submit, unfinished
from dimaskdino.reproduction.report import compare, markdown, to_csv
from dimaskdino.reproduction.runs import Run

REPOSITORY = Path(__file__).resolve().parents[1]
Runs = dict[str, list[Run]]


def main() -> None:
    """Plan, show the cost, train, collect."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parameters = slurm_parameters(args.slurm)
    launcher = Launcher(REPOSITORY, args.num_gpus)
    if args.submit:
        check_submission(launcher, parameters)
    wanted = choose_tables(args.tables, args.dataset or [])
    runs = {dataset: open_runs(dataset, tables, args) for dataset, tables in wanted.items()}
    failures: list[str] = []
    if not args.collect:
        jobs = [job for dataset, tables in wanted.items() for job in jobs_of(tables, runs[dataset])]
        failures += show_cost([job.run for job in jobs], args.output, launcher, args.measure)
        failures += do_missing(unfinished(jobs, launcher), launcher, args, parameters)
    if args.run or args.collect:
        for dataset, tables in wanted.items():
            for table in tables:
                collect(table, dataset, runs[dataset], args.output / dataset)
    if failures:
        raise UserError(f"{' '.join(failures)} Nothing else failed; the same command continues where it stopped.")


def do_missing(
    jobs: list[Job], launcher: Launcher, args: argparse.Namespace, parameters: dict[str, str | int]
) -> list[str]:
    """Submit or run what is left to do if asked to, otherwise say how; return the failures."""
    if not jobs:
        print("Nothing is left to do.")
        return []
    if args.verbose:
        for job in jobs:
            print(f"{job.run.name}: {shlex.join(job.next_command(launcher) or [])}")
    if args.run:
        return run_jobs(jobs, launcher)
    if args.submit:
        # Printed one by one, so that a later error does not hide them.
        for line in submit(jobs, launcher, parameters, cluster=args.submit):
            print(line, flush=True)
    else:
        hint = "" if args.verbose else ", --verbose shows their commands"
        print(f"{len(jobs)} runs have something left to do: --run starts them{hint}.")
    return []


def slurm_parameters(pairs: list[str]) -> dict[str, str | int]:
    """Read ``KEY=VALUE`` as submitit's parameters; whole numbers become integers."""
    parameters: dict[str, str | int] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UserError(f"--slurm takes KEY=VALUE, not {pair!r}.")
        parameters[key] = int(value) if value.isdecimal() else value
    return parameters


def open_runs(dataset: str, tables: list[Table], args: argparse.Namespace) -> Runs:
    """Open the runs of each row, one for each seed; none if the dataset has no configuration.

    Rows that name the same experiment share its runs.
    """
    runs: Runs = {}
    opened: Runs = {}
    seeds = [None] if args.seeds is None else range(1, args.seeds + 1)
    for row in (row for table in tables for row in table.rows):
        experiment = find_experiment(REPOSITORY / "configs", dataset, row.experiment)
        if experiment is not None and experiment.name not in opened:
            opened[experiment.name] = [Run.open(experiment, args.output, args.options, seed=seed) for seed in seeds]
        runs[row.experiment] = opened[experiment.name] if experiment else []
    return runs


def jobs_of(tables: list[Table], runs: Runs) -> list[Job]:
    """Make a job for every run, with results by stage if a table shows them."""
    with_layers: dict[Run, bool] = {}
    for table in tables:
        for run in (run for row in table.rows for run in runs[row.experiment]):
            with_layers[run] = with_layers.get(run, False) or table.needs_layers
    return [Job(run, layers) for run, layers in with_layers.items()]


def show_cost(runs: list[Run], output: Path, launcher: Launcher, iterations: int | None) -> list[str]:
    """Print what is left to train, measure the kinds of runs that have no speed yet if asked to, return failures."""
    known = speeds(runs, output)
    failures = []
    if iterations is not None:
        folders = {measure_folder(run, output): run for run in runs if run not in known and run.iterations_left}
        failures = measure_all(folders, launcher, iterations)
        known = speeds(runs, output)
    num_gpus = {run: given for run in runs if (given := launcher.gpus_of(run)) != launcher.num_gpus}
    print(f"{cost_table(runs, known, num_gpus)}\n\nTraining only; evaluations come on top.", flush=True)
    if num_gpus:
        print(
            f"A run with a number under GPUs gets that many, not {launcher.num_gpus}: no more can share its batch "
            "(SOLVER.IMS_PER_BATCH) equally."
        )
    if any(run not in known and run.iterations_left for run in runs):
        print("Hours are unknown until an iteration is measured: --measure 20 finds them on this machine.")
    return failures


def collect(table: Table, dataset: str, runs: Runs, folder: Path) -> None:
    """Print a table, and write it as Markdown, CSV, and a picture."""
    rows = compare(table, dataset, runs, *([] if table.shows_effects else [ap_interval]))
    if table.shows_effects:
        found = effects(table, dataset, runs)
        text, lines = effects_markdown(table, dataset, found), effects_csv(table, dataset, found)
    else:
        text, lines = markdown(table, dataset, rows), to_csv(table, dataset, rows)
    print(f"\n{text}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{table.name}.md").write_text(text, encoding="utf-8")
    (folder / f"{table.name}.csv").write_text(lines, encoding="utf-8")
    if table.shows_effects or not any(cell.ours is not None for row in rows for cell in row.cells):
        return
    picture = folder / f"{table.name}.png"
    if table.needs_layers:
        measured = {row.labels[0]: [run for run in runs[row.experiment] if run.layers()] for row in table.rows}
        stages = [StageResults.of_runs(label, of_row) for label, of_row in measured.items() if of_row]
        with_paper = any(value is not None for row in table.rows for value in row.paper.get(dataset, ()))
        draw_imbalance(stages, picture, with_paper=with_paper, lines=True)
    else:
        draw_table(table, dataset, rows, picture)
    print(f"chart: {picture}")


if __name__ == "__main__":
    run_cli(main)
