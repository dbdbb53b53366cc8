"""Our results beside the paper's, as Markdown to read and as CSV to process."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from dimaskdino.reproduction.experiments import DATASET_NAMES
from dimaskdino.reproduction.runs import Run
from dimaskdino.reproduction.tables import SPEED, Table, Values, metric_name

# Where a dataset is not the paper's, its rows keep the paper's labels and stand for smaller models.
_NOTES = {
    "shapes": "The paper has no numbers on shapes, a synthetic set. Rows carry the paper's labels, but the model is a "
    "small one: 2/15 of the tokens (600 is 80, 300 is 40), 2/3 of the decoder layers (6 is 4), epochs of its own."
}
# The paper has no numbers on shapes: changes against the first row stand beside those that it found here.
REFERENCE_DATASET = "bdd100k"
NOT_THERE = "–"


@dataclass(frozen=True)
class Compared:
    """One number of ours and what the paper has beside it.

    Attributes:
        ours: AP in percent or images per second, rounded as the paper's.
        paper: on the same dataset.
        change: of ours against the first row.
        paper_change: of the paper's against its first row, on REFERENCE_DATASET where it has nothing on ours.
        is_speed: images per second, which belong to a device: it has no difference or change.
    """

    ours: float | None
    paper: float | None
    change: float | None
    paper_change: float | None
    is_speed: bool = False

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.is_speed else _minus(self.ours, self.paper)


@dataclass(frozen=True)
class ComparedRow:
    """A row of a table with its run's results, one for each metric of the table, and where its speed was measured."""

    labels: tuple[str, ...]
    experiment: str
    status: str
    cells: tuple[Compared, ...]
    device: str = ""


def compare(table: Table, dataset: str, runs: Mapping[str, Run | None]) -> list[ComparedRow]:
    """Fill a table with what runs measured.

    Args:
        table: of the paper.
        dataset: that the runs are on.
        runs: by :attr:`Row.experiment`; None where the dataset has no configuration of the row.
    """
    ours = [_rounded(_results(table, runs[row.experiment])) for row in table.rows]
    nothing: Values = (None,) * len(table.metrics)
    paper = [row.paper.get(dataset, nothing) for row in table.rows]
    shown = dataset if table.has_paper_values(dataset) else REFERENCE_DATASET
    changes = [row.paper.get(shown, nothing) for row in table.rows]
    compared = []
    for index, row in enumerate(table.rows):
        run = runs[row.experiment]
        cells = [
            Compared(ours[index][column], paper[index][column], None, None, is_speed=True)
            if metric == SPEED
            else Compared(
                ours=ours[index][column],
                paper=paper[index][column],
                change=_minus(ours[index][column], ours[0][column]),
                paper_change=_minus(changes[index][column], changes[0][column]),
            )
            for column, metric in enumerate(table.metrics)
        ]
        name = run.experiment.name if run else row.experiment
        device = run.speed().get("device", "") if run and SPEED in table.metrics else ""
        compared.append(ComparedRow(row.labels, name, _status(table, dataset, run), tuple(cells), device))
    return compared


def _results(table: Table, run: Run | None) -> Values:
    return run.results(table) if run else (None,) * len(table.metrics)


def _status(table: Table, dataset: str, run: Run | None) -> str:
    if run is None:
        return f"not on {DATASET_NAMES[dataset]}"
    if run.is_finished and table.needs_layers and not run.layers():
        return "not evaluated by layer"
    return run.status


def heading(table: Table, dataset: str) -> str:
    """For example "Table 4: Main modules, on COCO"."""
    number = table.name.removeprefix("table").removeprefix("figure")
    kind = table.name.removesuffix(number).capitalize()
    return f"{kind} {number}: {table.title}, on {DATASET_NAMES[dataset]}"


def markdown(table: Table, dataset: str, rows: Sequence[ComparedRow]) -> str:
    """The table with a heading and what its cells mean."""
    of_paper = table.has_paper_values(dataset)
    heads = [*table.label_names, "run", "status", *map(metric_name, table.metrics)]
    body = [
        [*row.labels, row.experiment, row.status, *(_cell(cell, of_paper, first=row is rows[0]) for cell in row.cells)]
        for row in rows
    ]
    reference = DATASET_NAMES[REFERENCE_DATASET]
    meaning = (
        "Ours / the paper's (difference), AP in percent."
        if of_paper
        else f"Ours (change against the first row; the paper's change on {reference}), AP in percent."
    )
    note = f" {_NOTES[dataset]}" if dataset in _NOTES else ""
    text = tabulate(body, headers=heads, tablefmt="github", disable_numparse=True)
    speed = f"\n{_speed_note(rows)}\n" if SPEED in table.metrics else ""
    return f"### {heading(table, dataset)}\n\n{meaning}{note}\n\n{text}\n{speed}"


def _speed_note(rows: Sequence[ComparedRow]) -> str:
    """What FPS means, and on which device which rows have it."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        if row.device:
            runs.setdefault(row.device, []).append(row.experiment)
    where = [device if len(runs) == 1 else f"{device} ({', '.join(names)})" for device, names in runs.items()]
    measured = f"ours on {'; '.join(where)}" if where else "ours not measured"
    return f"FPS: images per second of one process, one image at a time; it depends on the device: {measured}."


def _cell(cell: Compared, of_paper: bool, *, first: bool) -> str:
    ours = _number(cell.ours)
    if cell.is_speed and not of_paper:
        return ours
    if of_paper:
        difference = "" if cell.difference is None else f" ({cell.difference:+.1f})"
        return f"{ours} / {_number(cell.paper)}{difference}"
    if first:
        return ours
    changes = [f"{cell.change:+.1f}"] if cell.change is not None else []
    changes += [f"paper {cell.paper_change:+.1f}"] if cell.paper_change is not None else []
    return f"{ours} ({'; '.join(changes)})" if changes else ours


def to_csv(table: Table, dataset: str, rows: Sequence[ComparedRow]) -> str:
    """The table with a line for each row, its columns named; empty where there is no number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("", " paper", " difference", " change", " paper change")
    names = [f"{metric_name(metric)}{column}" for metric in table.metrics for column in columns]
    device = ["FPS device"] if SPEED in table.metrics else []
    writer.writerow(["table", "dataset", *table.label_names, "run", "status", *names, *device])
    for row in rows:
        values = [
            "" if value is None else f"{value:.1f}"
            for cell in row.cells
            for value in (cell.ours, cell.paper, cell.difference, cell.change, cell.paper_change)
        ]
        where = [row.device] if device else []
        writer.writerow([table.name, dataset, *row.labels, row.experiment, row.status, *values, *where])
    return file.getvalue()


def _number(value: float | None) -> str:
    return NOT_THERE if value is None else f"{value:.1f}"


def _rounded(values: Values) -> Values:
    return tuple(None if value is None else round(value, 1) for value in values)


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one - other, 1)
