"""The papers' tables as data: the label of each row, the configuration behind it, and the paper's numbers."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimaskdino.errors import UserError

Values = tuple[float | None, ...]

DATASET_NAMES = {
    "coco": "COCO",
    "bdd100k": "BDD100K",
    "ade20k": "ADE20K",
    "cityscapes": "Cityscapes",
    "shapes": "shapes",
}
DATASETS = tuple(DATASET_NAMES)
# Images of an epoch as the schedules count them: MaskDINO's release rounds COCO's 118,287.
EPOCH_IMAGES = {"coco": 118_000, "bdd100k": 7_000, "ade20k": 20_210, "cityscapes": 2_975, "shapes": 2_000}
SPEED = "speed/images_per_second"

_PAPERS = Path(__file__).with_name("papers")
_TASKS = {"bbox": "box AP", "segm": "mask AP"}
_SEGMENTATION = {"panoptic_seg/PQ": "PQ", "sem_seg/mIoU": "mIoU"}
_SIZES = {"AP": "", "AP50": " 50", "AP75": " 75", "APs": " S", "APm": " M", "APl": " L"}
_STAGE_METRICS = {"box_AP": "box AP", "mask_AP": "mask AP", "gap": "box - mask", "PQ": "PQ"}
# The models that the ablations start from. On shapes, MaskDINO has the decoder layers of DI-MaskDINO, so it is the run
# without either module.
_MAIN = {
    ("coco", "dimaskdino"): "dimaskdino_r50_12ep",
    ("coco", "maskdino"): "maskdino_r50_12ep",
    ("bdd100k", "dimaskdino"): "dimaskdino_r50_68ep",
    ("bdd100k", "maskdino"): "maskdino_r50_68ep",
    ("shapes", "maskdino"): "neither",
    # Panoptic and semantic models, by their path under configs/: some have the names of instance models.
    ("coco", "maskdino_panoptic"): "panoptic/maskdino_r50_50ep",
    ("coco", "maskdino_panoptic_swinl"): "panoptic/maskdino_swinl_50ep",
    ("coco", "dimaskdino_panoptic"): "panoptic/dimaskdino_r50_50ep",
    ("shapes", "maskdino_panoptic"): "demo/maskdino_panoptic_shapes",
    ("shapes", "dimaskdino_panoptic"): "demo/dimaskdino_panoptic_shapes",
    ("ade20k", "maskdino_semantic"): "semantic/maskdino_r50_ade20k_160k",
    ("ade20k", "dimaskdino_semantic"): "semantic/dimaskdino_r50_ade20k_160k",
    ("cityscapes", "maskdino_semantic"): "semantic/maskdino_r50_cityscapes_90k",
    ("cityscapes", "dimaskdino_semantic"): "semantic/dimaskdino_r50_cityscapes_90k",
    ("shapes", "maskdino_semantic"): "demo/maskdino_semantic_shapes",
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training on one dataset, which may fill rows of several tables."""

    dataset: str  # one of DATASETS
    name: str  # of the configuration file and of the run's folder
    config_file: Path  # the configuration to train


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    labels: tuple[str, ...]  # its first columns
    experiment: str  # name that :func:`find_experiment` resolves; rows of several tables may share one
    # its numbers by dataset, in the order of the table's metrics: AP in percent, speed in images per second, None where
    # the paper has none
    paper: Mapping[str, Values]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure of a paper."""

    name: str  # on the command line: "table4", "figure1"
    paper: str  # the paper's model
    number: str  # in the paper: "Table 4"
    title: str  # what it compares
    label_names: tuple[str, ...]  # heads of the first columns
    # "bbox/AP" and the like from a run's results, "first/box_AP" and "last/gap" from its results by decoder layer,
    # SPEED
    metrics: tuple[str, ...]
    datasets: tuple[str, ...]  # where it can be made
    rows: tuple[Row, ...]  # in the paper's order
    shows_effects: bool = False  # whether it shows the effects of two modules, from the four runs with and without each

    @property
    def needs_layers(self) -> bool:
        """Whether it shows results by decoder layer."""
        return any(metric.startswith(("first/", "last/")) for metric in self.metrics)

    def has_paper_values(self, dataset: str) -> bool:
        """Whether the paper measured it on ``dataset``."""
        return any(dataset in row.paper for row in self.rows)

    @property
    def reference_dataset(self) -> str:
        """The paper's dataset, the smallest of several, whose changes stand beside ours where it has no numbers."""
        return [dataset for dataset in DATASETS if self.has_paper_values(dataset)][-1]

    def heading(self, dataset: str) -> str:
        """For example "DI-MaskDINO, Table 4: Main modules, on COCO"."""
        return f"{self.paper}, {self.number}: {self.title}, on {DATASET_NAMES[dataset]}"


@functools.cache
def paper_tables() -> dict[str, Table]:
    """All tables and figures by name, each paper's in its order."""
    tables = {}
    for file in sorted(_PAPERS.glob("*.json")):
        paper = json.loads(file.read_text())
        for name, content in paper["tables"].items():
            if "effects_of" in content:
                content = {**paper["tables"][content["effects_of"]], **content}
            tables[paper["prefix"] + name] = _table(paper["paper"], paper["prefix"], name, content)
    return tables


def _table(paper: str, prefix: str, name: str, content: dict[str, Any]) -> Table:
    kind = name.rstrip("0123456789")
    rows = tuple(
        Row(
            labels=tuple(row["labels"]),
            experiment=row["experiment"],
            paper={dataset: tuple(row[dataset]) for dataset in DATASETS if dataset in row},
        )
        for row in content["rows"]
    )
    return Table(
        name=prefix + name,
        paper=paper,
        number=content.get("number") or f"{kind.capitalize()} {name.removeprefix(kind)}",
        title=content["title"],
        label_names=tuple(content["labels"]),
        metrics=tuple(content["metrics"]),
        datasets=tuple(content["datasets"]),
        rows=rows,
        shows_effects="effects_of" in content,
    )


def find_experiment(configs: Path, dataset: str, row: str) -> Experiment | None:
    """Find the experiment that a row (:attr:`Row.experiment`) names; None if the dataset has no configuration of it."""
    name = _MAIN.get((dataset, row), row)
    if "/" in name:
        return Experiment(dataset=dataset, name=name.replace("/", "_"), config_file=configs / f"{name}.yaml")
    ablations = configs / "ablation"
    main = [configs / "dino"] if dataset == "coco" else []
    for folder in (configs / dataset, *main, ablations / dataset, ablations / "dino" / dataset):
        file = folder / f"{name}.yaml"
        if file.is_file():
            return Experiment(dataset=dataset, name=name, config_file=file)
    return None


def choose_tables(names: Sequence[str], datasets: Sequence[str]) -> dict[str, list[Table]]:
    """Choose the tables to make on each dataset, in the paper's order; without any, on those that the paper measured.

    Raises UserError for a table that cannot be made on a dataset named here.
    """
    tables = [table for table in paper_tables().values() if "all" in names or table.name in names]
    if not datasets:
        of_paper = dict.fromkeys(dataset for table in tables for row in table.rows for dataset in row.paper)
        return {dataset: [table for table in tables if table.has_paper_values(dataset)] for dataset in of_paper}
    for dataset in datasets:
        for table in tables:
            if table.name in names and dataset not in table.datasets:
                raise UserError(f"{table.name} cannot be made on {dataset}, only on {', '.join(table.datasets)}.")
    return {dataset: [table for table in tables if dataset in table.datasets] for dataset in datasets}


def metric_name(metric: str) -> str:
    """A metric as the head of a column: "box AP S", "first layer mask AP", "FPS"."""
    if metric == SPEED:
        return "FPS"
    if metric in _SEGMENTATION:
        return _SEGMENTATION[metric]
    group, _, name = metric.partition("/")
    if group in _TASKS:
        return _TASKS[group] + _SIZES[name]
    return f"{group} layer {_STAGE_METRICS[name]}"
