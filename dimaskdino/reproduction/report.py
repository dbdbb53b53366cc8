"""Our results beside the paper's, as Markdown to read and as CSV to process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from dimaskdino.reproduction.effects import NOT_THERE, Interval, csv_text
from dimaskdino.reproduction.runs import Run
from dimaskdino.reproduction.tables import DATASET_NAMES, SPEED, Table, metric_name

# On a dataset of our own, rows keep the paper's labels and stand for smaller models.
_NOTES = {
    "shapes": "The paper has no numbers on shapes, a synthetic set. Rows keep the paper's labels, but the model is a "
    "small one: 2/15 of the tokens (80 for 600, 40 for 300), 2/3 of the decoder layers (4 for 6), a shorter schedule."
}
Runs = Mapping[str, Sequence[Run]]
IntervalOf = Callable[[Run, Run, str], Interval | None]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One number of ours with the paper's."""

    # AP in percent or images per second, the mean over the finished runs, rounded as the paper's
    ours: float | None = None
    spread: float | None = None  # standard deviation over the runs; None for a single one
    paper: float | None = None  # on the same dataset
    # of ours against the first row. Speed belongs to a device, so it has no change or difference.
    change: float | None = None
    # of the paper's against its first row, on the table's reference dataset if it has nothing on ours
    paper_change: float | None = None
    # of the change, in percent, over the images of the test set; None where it was not computed
    interval: Interval | None = None
    is_speed: bool = False

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.is_speed else _minus(self.ours, self.paper)


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """A row of a table with its runs' results, one for each metric, and the devices that gave its speed."""

    labels: tuple[str, ...]
    experiment: str
    status: str
    cells: tuple[Compared, ...]
    devices: tuple[str, ...] = ()


def compare(
    table: Table, dataset: str, runs: Runs, interval_of: IntervalOf = lambda first, other, metric: None
) -> list[ComparedRow]:
    """Fill a table with what runs measured; intervals are asked for where rows have one run."""
    first_run = _only_run(runs[table.rows[0].experiment])
    paper = _columns(table, dataset)
    changes = paper if table.has_paper_values(dataset) else _columns(table, table.reference_dataset)
    rows: list[ComparedRow] = []
    for row, paper_row, changes_row in zip(table.rows, paper, changes, strict=True):
        of_row = runs[row.experiment]
        measured = [run.results(table) for run in of_row]
        this_run = _only_run(of_row) if rows else None
        cells = []
        for column, metric in enumerate(table.metrics):
            values = [value for results in measured if (value := results[column]) is not None]
            ours = round(mean(values), 1) if values else None
            cell: dict[str, Any] = {"ours": ours, "paper": paper_row[column], "is_speed": metric == SPEED}
            if len(values) > 1:
                cell["spread"] = stdev(values)
            if metric != SPEED:
                cell["change"] = _minus(ours, rows[0].cells[column].ours if rows else ours)
                cell["paper_change"] = _minus(changes_row[column], changes[0][column])
            if first_run and this_run:
                cell["interval"] = interval_of(first_run, this_run, metric)
            cells.append(Compared(**cell))
        rows.append(
            ComparedRow(
                labels=row.labels,
                experiment=of_row[0].experiment.name if of_row else row.experiment,
                status=_status(table, dataset, of_row),
                cells=tuple(cells),
                devices=tuple(dict.fromkeys(device for run in of_row if (device := run.speed().get("device")))),
            )
        )
    return rows


def _only_run(runs: Sequence[Run]) -> Run | None:
    """The run of a row that has one and no more, if it is finished."""
    return runs[0] if len(runs) == 1 and runs[0].is_finished else None


def _columns(table: Table, dataset: str) -> list[Sequence[float | None]]:
    return [row.paper.get(dataset, (None,) * len(table.metrics)) for row in table.rows]


def _status(table: Table, dataset: str, runs: Sequence[Run]) -> str:
    if not runs:
        return f"not on {DATASET_NAMES[dataset]}"
    each = [run.status for run in runs]
    if table.needs_layers:
        each = ["not evaluated by layer" if run.is_finished and not run.layers() else run.status for run in runs]
    return each[0] if len(each) == 1 else f"{each.count('finished')} of {len(each)} seeds finished"


def markdown(table: Table, dataset: str, rows: Sequence[ComparedRow]) -> str:
    """The table with a heading and what its cells mean."""
    of_paper = table.has_paper_values(dataset)
    heads = [*table.label_names, "run", "status", *map(metric_name, table.metrics)]
    body = [
        [*row.labels, row.experiment, row.status, *(_cell(cell, of_paper, first=row is rows[0]) for cell in row.cells)]
        for row in rows
    ]
    meaning = (
        "Ours / the paper's (difference), AP in percent."
        if of_paper
        else f"Ours (change against the first row; the paper's change on {DATASET_NAMES[table.reference_dataset]}), "
        "AP in percent."
    )
    if _has_spread(rows):
        meaning += " Ours is the mean over seeds ± their standard deviation."
    note = f" {_NOTES[dataset]}" if dataset in _NOTES else ""
    text = tabulate(body, headers=heads, tablefmt="github", disable_numparse=True)
    speed = f"\n{_speed_note(rows)}\n" if SPEED in table.metrics else ""
    return f"### {table.heading(dataset)}\n\n{meaning}{note}\n\n{text}\n{speed}{_interval_table(table, rows)}"


def _interval_table(table: Table, rows: Sequence[ComparedRow]) -> str:
    """The changes against the first row with their intervals; empty where there are none."""
    columns = _with_intervals(table, rows)
    if not columns:
        return ""
    body = [[*row.labels, *(_changed(row.cells[index]) for index in columns)] for row in rows[1:]]
    heads = [*table.label_names, *(metric_name(table.metrics[index]) for index in columns)]
    text = tabulate(body, headers=heads, tablefmt="github", disable_numparse=True)
    return (
        "\nChange against the first row, and its 95% interval over the images of the test set (bootstrap). It says "
        f"nothing about another seed: that takes --seeds.\n\n{text}\n"
    )


def _with_intervals(table: Table, rows: Sequence[ComparedRow]) -> list[int]:
    return [index for index in range(len(table.metrics)) if any(row.cells[index].interval for row in rows)]


def _changed(cell: Compared) -> str:
    if cell.interval is None or cell.change is None:
        return NOT_THERE
    low, high = cell.interval
    return f"{cell.change:+.1f} [{low:+.1f}, {high:+.1f}]"


def _speed_note(rows: Sequence[ComparedRow]) -> str:
    """What FPS means, and which rows were measured on which device."""
    names: dict[str, list[str]] = {}
    for row in rows:
        for device in row.devices:
            names.setdefault(device, []).append(row.experiment)
    where = [device if len(names) == 1 else f"{device} ({', '.join(of_device)})" for device, of_device in names.items()]
    measured = f"ours on {'; '.join(where)}" if where else "ours not measured"
    return f"FPS: images per second of one process, one image at a time; it depends on the device: {measured}."


def _cell(cell: Compared, of_paper: bool, *, first: bool) -> str:
    ours = _number(cell.ours) + ("" if cell.spread is None else f" ± {cell.spread:.1f}")
    if of_paper:
        difference = "" if cell.difference is None else f" ({cell.difference:+.1f})"
        return f"{ours} / {_number(cell.paper)}{difference}"
    if first or cell.is_speed:
        return ours
    changes = [f"{cell.change:+.1f}"] if cell.change is not None else []
    changes += [f"paper {cell.paper_change:+.1f}"] if cell.paper_change is not None else []
    return f"{ours} ({'; '.join(changes)})" if changes else ours


def to_csv(table: Table, dataset: str, rows: Sequence[ComparedRow]) -> str:
    """The table with named columns and a line for each row; cells without a number are empty."""
    columns = {"": "ours", " paper": "paper", " difference": "difference", " change": "change"}
    columns |= {" paper change": "paper_change"} | ({" spread": "spread"} if _has_spread(rows) else {})
    names = [f"{metric_name(metric)}{column}" for metric in table.metrics for column in columns]
    intervals = _with_intervals(table, rows)
    ends = ("at least", "at most")
    names += [f"{metric_name(table.metrics[index])} change {end}" for index in intervals for end in ends]
    device = ["FPS device"] if SPEED in table.metrics else []
    lines = [["table", "dataset", *table.label_names, "run", "status", *names, *device]]
    for row in rows:
        values = [getattr(cell, attribute) for cell in row.cells for attribute in columns.values()]
        values += [end for index in intervals for end in row.cells[index].interval or (None, None)]
        texts = ["" if value is None else f"{value:.1f}" for value in values]
        where = ["; ".join(row.devices)] if device else []
        lines.append([table.name, dataset, *row.labels, row.experiment, row.status, *texts, *where])
    return csv_text(lines)


def _has_spread(rows: Sequence[ComparedRow]) -> bool:
    return any(cell.spread is not None for row in rows for cell in row.cells)


def _number(value: float | None) -> str:
    return NOT_THERE if value is None else f"{value:.1f}"


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one - other, 1)
