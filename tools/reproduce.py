#!/usr/bin/env python
"""Redo tables of the paper: say what they cost, train and evaluate their rows, print ours beside the paper's.

Without --run, --submit or --collect it only says what would be done. A finished run is not trained again, and an
interrupted one goes on. Runs lie under OUTPUT/DATASET/ROW, tables and charts beside them.
"""

import argparse
import logging
import shlex
from pathlib import Path

from dimaskdino.command_line import at_least
from dimaskdino.errors import UserError, run_cli
from dimaskdino.reproduction.charts import draw_table
from dimaskdino.reproduction.costs import cost_table, measure_folder, speeds
from dimaskdino.reproduction.experiments import DATASETS, find_experiment
from dimaskdino.reproduction.imbalance import StageResults, draw_imbalance
from dimaskdino.reproduction.jobs import Job, Launcher, measure_all, run_jobs, unfinished
from dimaskdino.reproduction.report import compare, markdown, to_csv
from dimaskdino.reproduction.runs import Run, read_stages
from dimaskdino.reproduction.slurm import check_submission, submit
from dimaskdino.reproduction.tables import Table, choose_tables, paper_tables

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = """
  what would be done    tools/reproduce.py table4 --dataset bdd100k
  what it would cost    tools/reproduce.py all --measure 20 --num-gpus 8
  on this machine       tools/reproduce.py table4 --dataset bdd100k --run --num-gpus 8
  on a cluster          tools/reproduce.py table4 --dataset bdd100k --submit slurm --num-gpus 8 --slurm timeout_min=2880
  what is there so far  tools/reproduce.py table4 --dataset bdd100k --collect
  on a laptop           tools/reproduce.py table4 --dataset shapes --run
"""


def parse_args() -> argparse.Namespace:
    """The command line."""
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
    action.add_argument("--submit", choices=["slurm"], help="send what is missing to a cluster, a job each")
    action.add_argument("--collect", action="store_true", help="only print the tables from the runs that are there")
    action.add_argument("--dry-run", action="store_true", help="only say what would be done and its cost (default)")
    parser.add_argument("--measure", type=int, metavar="N", help="train N iterations of each kind first, for the cost")
    parser.add_argument("--num-gpus", type=at_least(0), help="as for train_net.py; 0 means the CPU")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), help="folder of all runs and tables")
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's parameters; timeout_min is needed"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY VALUE", help="keys on top of every configuration file"
    )
    return parser.parse_args()


def main() -> None:
    """Plan, cost, train, collect."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parameters = slurm_parameters(args.slurm)
    launcher = Launcher(REPOSITORY, args.num_gpus)
    if args.submit:
        check_submission(launcher, parameters)
    wanted = choose_tables(args.tables, args.dataset or [])
    runs = {dataset: open_runs(dataset, tables, args.output, args.options) for dataset, tables in wanted.items()}
    failures: list[str] = []
    if not args.collect:
        jobs = [job for dataset, tables in wanted.items() for job in jobs_of(tables, runs[dataset])]
        failures += say_cost(jobs, args.output, launcher, args.measure)
        missing = unfinished(jobs, launcher)
        if args.submit:
            say_submissions(missing, launcher, parameters, args.submit)
        elif args.run:
            failures += run_jobs(missing, launcher)
        else:
            say_commands(missing, launcher)
    if args.run or args.collect:
        for dataset, tables in wanted.items():
            for table in tables:
                collect(table, dataset, runs[dataset], args.output / dataset)
    if failures:
        raise UserError(f"{' '.join(failures)} Nothing else failed; the same command goes on where it stopped.")


def slurm_parameters(pairs: list[str]) -> dict[str, str | int]:
    """``KEY=VALUE`` as submitit's parameters; whole numbers as such."""
    parameters: dict[str, str | int] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UserError(f"--slurm takes KEY=VALUE, not {pair!r}.")
        parameters[key] = int(value) if value.isdecimal() else value
    return parameters


def open_runs(dataset: str, tables: list[Table], output: Path, options: list[str]) -> dict[str, Run | None]:
    """The runs of the tables' rows, None where the dataset has no configuration; one run for all rows that show it."""
    runs: dict[str, Run | None] = {}
    opened: dict[str, Run] = {}
    for row in (row for table in tables for row in table.rows):
        experiment = find_experiment(REPOSITORY / "configs", dataset, row.experiment)
        if experiment is not None and experiment.name not in opened:
            opened[experiment.name] = Run.open(experiment, output, options)
        runs[row.experiment] = opened[experiment.name] if experiment else None
    return runs


def jobs_of(tables: list[Table], runs: dict[str, Run | None]) -> list[Job]:
    """A job for every run, with results by stage where a table shows them."""
    with_layers: dict[Run, bool] = {}
    for table in tables:
        for row in table.rows:
            run = runs[row.experiment]
            if run is not None:
                with_layers[run] = with_layers.get(run, False) or table.needs_layers
    return [Job(run, layers) for run, layers in with_layers.items()]


def say_cost(jobs: list[Job], output: Path, launcher: Launcher, iterations: int | None) -> list[str]:
    """Print what is left to train; measure the kinds of runs that were not measured yet if that is asked for.

    Returns:
        What happened to each measurement that failed.
    """
    runs = [job.run for job in jobs]
    known = speeds(runs, output)
    failures = []
    if iterations is not None:
        folders = {measure_folder(run, output): run for run in runs if run not in known and run.iterations_left}
        failures = measure_all(folders, launcher, iterations)
        known = speeds(runs, output)
    num_gpus = {run: given for run in runs if (given := launcher.gpus_of(run)) != launcher.num_gpus}
    print(f"{cost_table(runs, known, num_gpus)}\n\nTraining alone; evaluations come on top.", flush=True)
    if num_gpus:
        print(
            f"A run with a number under GPUs gets that many, not {launcher.num_gpus}: no more can share its batch "
            "(SOLVER.IMS_PER_BATCH) equally."
        )
    if any(run not in known and run.iterations_left for run in runs):
        print("Hours are unknown where no iteration was measured: --measure 20 measures some on this machine.")
    return failures


def say_submissions(jobs: list[Job], launcher: Launcher, parameters: dict[str, str | int], cluster: str) -> None:
    """Submit the jobs and print what became of each, so that a later error does not hide it."""
    for line in submit(jobs, launcher, parameters, cluster=cluster):
        print(line, flush=True)
    if not jobs:
        print("Nothing is left to do.")


def say_commands(jobs: list[Job], launcher: Launcher) -> None:
    """Print what --run would start first for every run."""
    print("\n--run would start:" if jobs else "\nNothing is left to do.")
    for job in jobs:
        print(" ", shlex.join(job.next_command(launcher) or []))


def collect(table: Table, dataset: str, runs: dict[str, Run | None], folder: Path) -> None:
    """Print a table, and write it as Markdown, CSV and a picture."""
    rows = compare(table, dataset, runs)
    text = markdown(table, dataset, rows)
    print(f"\n{text}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{table.name}.md").write_text(text, encoding="utf-8")
    (folder / f"{table.name}.csv").write_text(to_csv(table, dataset, rows), encoding="utf-8")
    picture = folder / f"{table.name}.png"
    if not any(cell.ours is not None for row in rows for cell in row.cells):
        return
    if table.needs_layers:
        measured = [(row.labels[0], run) for row in table.rows if (run := runs[row.experiment]) and run.layers()]
        stages = [StageResults(label, read_stages(run.folder)) for label, run in measured]
        draw_imbalance(stages, picture, with_paper=table.has_paper_values(dataset), lines=True)
    else:
        draw_table(table, dataset, rows, picture)
    print(f"chart: {picture}")


if __name__ == "__main__":
    run_cli(main)
