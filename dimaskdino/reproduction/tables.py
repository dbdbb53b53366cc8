"""The paper's tables and its Figure 1 as data: what each row is called, which experiment it shows, and its numbers."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimaskdino.errors import UserError

Values = tuple[float | None, ...]

_FILE = Path(__file__).with_name("paper_tables.json")
_TASKS = {"bbox": "box AP", "segm": "mask AP"}
_SIZES = {"AP": "", "APs": " S", "APm": " M", "APl": " L"}
# Images per second of the forward pass.
SPEED = "speed/images_per_second"
_STAGE_METRICS = {"box_AP": "box AP", "mask_AP": "mask AP", "gap": "box - mask"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
        labels: what stands in its first columns.
        experiment: the run that it shows; rows of several tables may show the same one.
        paper: its numbers by dataset, in the order of the table's metrics, AP in percent, speed in images per second;
            None where there is none.
    """

    labels: tuple[str, ...]
    experiment: str
    paper: Mapping[str, Values]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure of the paper.

    Attributes:
        name: table1 to table9, figure1.
        title: what it compares.
        label_names: heads of the first columns.
        metrics: what is measured: ``bbox/AP`` and the like from a run's results, ``first/box_AP`` and ``last/gap`` from
            its results by stage, SPEED.
        datasets: on which it can be made.
        rows: in the paper's order.
    """

    name: str
    title: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def needs_layers(self) -> bool:
        """Whether it shows results by stage."""
        return any(metric.startswith(("first/", "last/")) for metric in self.metrics)

    def has_paper_values(self, dataset: str) -> bool:
        """Whether the paper measured it on ``dataset``."""
        return any(dataset in row.paper for row in self.rows)


@functools.cache
def paper_tables() -> dict[str, Table]:
    """Tables 1 to 9 and Figure 1 by name, MaskDINO's and DI-MaskDINO's rows alone."""
    tables = json.loads(_FILE.read_text())["tables"]
    return {name: _table(name, content) for name, content in tables.items()}


def _table(name: str, content: dict[str, Any]) -> Table:
    known = ("labels", "experiment")
    rows = tuple(
        Row(
            labels=tuple(row["labels"]),
            experiment=row["experiment"],
            paper={dataset: tuple(values) for dataset, values in row.items() if dataset not in known},
        )
        for row in content["rows"]
    )
    return Table(
        name=name,
        title=content["title"],
        label_names=tuple(content["labels"]),
        metrics=tuple(content["metrics"]),
        datasets=tuple(content["datasets"]),
        rows=rows,
    )


def choose_tables(names: Sequence[str], datasets: Sequence[str]) -> dict[str, list[Table]]:
    """Which tables to make on which dataset.

    Args:
        names: of tables; ``all`` stands for every one.
        datasets: none means those that the paper measured each table on.

    Returns:
        By dataset its tables, in the paper's order.

    Raises:
        UserError: a table is asked for by name that cannot be made on a dataset that is asked for.
    """
    tables = [table for table in paper_tables().values() if "all" in names or table.name in names]
    if not datasets:
        of_paper = dict.fromkeys(dataset for table in tables for row in table.rows for dataset in row.paper)
        return {dataset: [table for table in tables if table.has_paper_values(dataset)] for dataset in of_paper}
    for dataset in datasets:
        for table in tables:
            if table.name in names and dataset not in table.datasets:
                raise UserError(f"{table.name} is not made on {dataset}; it is on {', '.join(table.datasets)}.")
    return {dataset: [table for table in tables if dataset in table.datasets] for dataset in datasets}


def metric_name(metric: str) -> str:
    """A metric as a column's head: "box AP S", "first layer mask AP", "FPS"."""
    if metric == SPEED:
        return "FPS"
    group, _, name = metric.partition("/")
    if group in _TASKS:
        return _TASKS[group] + _SIZES[name]
    return f"{group} layer {_STAGE_METRICS[name]}"
