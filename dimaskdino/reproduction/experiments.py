"""Which configuration file makes which row of the paper's tables, on which dataset."""

from dataclasses import dataclass
from pathlib import Path

DATASETS = ("coco", "bdd100k", "shapes")
DATASET_NAMES = {"coco": "COCO", "bdd100k": "BDD100K", "shapes": "shapes"}
# Images of an epoch as the schedules count them: MaskDINO's release rounds COCO's 118,287.
EPOCH_IMAGES = {"coco": 118_000, "bdd100k": 7_000, "shapes": 2_000}

# The models that the ablations start from and are compared with. On shapes MaskDINO has the decoder layers of
# DI-MaskDINO, so that it is the run without either module.
_MAIN = {
    ("coco", "dimaskdino"): "dimaskdino_r50_12ep",
    ("coco", "maskdino"): "maskdino_r50_12ep",
    ("bdd100k", "dimaskdino"): "dimaskdino_r50_68ep",
    ("bdd100k", "maskdino"): "maskdino_r50_68ep",
    ("shapes", "maskdino"): "neither",
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training: a row of at least one table, on one dataset.

    Attributes:
        dataset: coco, bdd100k or shapes.
        name: of its configuration file and of the folder of its run.
        config_file: what is trained.
    """

    dataset: str
    name: str
    config_file: Path


def find_experiment(configs: Path, dataset: str, row: str) -> Experiment | None:
    """The experiment that a row names, or None where the dataset has no configuration of it.

    Args:
        configs: the repository's folder of configurations.
        dataset: one of DATASETS.
        row: :attr:`dimaskdino.reproduction.tables.Row.experiment`.
    """
    name = _MAIN.get((dataset, row), row)
    for folder in (configs / dataset, configs / "ablation" / dataset):
        file = folder / f"{name}.yaml"
        if file.is_file():
            return Experiment(dataset=dataset, name=name, config_file=file)
    return None
