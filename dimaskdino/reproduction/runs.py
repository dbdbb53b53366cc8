"""A run's folder: how far it got, whether it is what its configuration file says, and what it measured."""

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dimaskdino.config import Config, flatten, get_cfg, read_config, read_yaml
from dimaskdino.engine.writers import METRICS_FILE, records
from dimaskdino.errors import ConfigError, UserError
from dimaskdino.evaluation.report import stage_columns
from dimaskdino.evaluation.speed import SPEED_FILE
from dimaskdino.reproduction.tables import Experiment, Table, Values
from dimaskdino.structures import Stage

logger = logging.getLogger(__name__)

StageRows = list[dict[str, Any]]

# Keys that say how and where a run is made, not what it trains.
_FREE_KEYS = frozenset(
    {
        "CUDNN_BENCHMARK",
        "DATALOADER.NUM_WORKERS",
        "DATASETS.SHAPES.ROOT",
        "MODEL.DEVICE",
        "OUTPUT_DIR",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.EVAL_LAYERS",
        "TEST.EVAL_PERIOD",
        "VERSION",
        "VIS_PERIOD",
    }
)
_MOST_DIFFERENCES = 10
_TAIL_BYTES = 2**18  # enough of metrics.json to hold its last evaluation
_MASK_SCORES = ("box_AP", "mask_AP", "gap")  # of a stage of a model with masks
_SEGMENTATION_SCORES = ("PQ", "mIoU")
_BY_STAGE = (
    "evaluate the run by stage: train_net.py --config-file FILE --eval-only --resume --eval-layers all OUTPUT_DIR RUN"
)


@dataclass(frozen=True, eq=False)
class Run:
    """An experiment and the folder of its training, which may not exist yet."""

    experiment: Experiment  # what is trained
    folder: Path  # OUTPUT_DIR
    cfg: Config  # the experiment's file with the options
    options: tuple[str, ...]  # keys and values on top of the file, as on a command line

    @classmethod
    def open(
        cls, experiment: Experiment, output: Path, options: Sequence[str] = (), *, seed: int | None = None
    ) -> "Run":
        """Open the run of an experiment, or of one ``seed``, under ``output``; ConfigError if it is of another one."""
        name = experiment.name
        if seed is not None:
            name, options = f"{name}_seed{seed}", (*options, "SEED", str(seed))
        cfg = read_config(experiment.config_file)
        cfg.merge_from_list(list(options))
        run = cls(experiment, output / experiment.dataset / name, cfg, tuple(options))
        run._check_config()
        return run

    @property
    def name(self) -> str:
        """``DATASET/FOLDER``."""
        return f"{self.experiment.dataset}/{self.folder.name}"

    @property
    def max_iter(self) -> int:
        """Iterations of the whole training."""
        return self.cfg.SOLVER.MAX_ITER

    @property
    def has_checkpoint(self) -> bool:
        """Whether a training can resume here."""
        return (self.folder / "last_checkpoint").is_file()

    @property
    def iterations_done(self) -> int:
        """Iterations in the last checkpoint."""
        if not self.has_checkpoint:
            return 0
        found = re.search(r"model_(\d+)", (self.folder / "last_checkpoint").read_text())
        return int(found[1]) + 1 if found else self.max_iter

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end and evaluated there."""
        if not (tasks := list(self._scores())):
            return False
        found = records(self.folder / METRICS_FILE, f'"{tasks[0]}/', last_bytes=_TAIL_BYTES)
        evaluated = [record["iteration"] for _, record in found]
        return bool(evaluated) and evaluated[-1] >= self.max_iter

    @property
    def iterations_left(self) -> int:
        """Iterations that are not trained yet."""
        return 0 if self.is_finished else max(self.max_iter - self.iterations_done, 0)

    @property
    def status(self) -> str:
        """``finished``, ``not run``, or how far it got."""
        if self.is_finished:
            return "finished"
        done = self.iterations_done
        if done >= self.max_iter:
            return "not evaluated"
        return f"stopped at {done} of {self.max_iter}" if done else "not run"

    def results(self, table: Table) -> Values:
        """The metrics of ``table``: AP in percent, speed in images per second, None for what was not measured."""
        scores: dict[str, Any] = {}
        if self.is_finished:
            layers = self.layers() if table.needs_layers else []
            ends = {"first": layers[0], "last": layers[-1]} if layers else {}
            scores = {**self._scores(), **ends, "speed": self.speed()}
        pairs = [metric.split("/") for metric in table.metrics]
        return tuple(scores.get(group, {}).get(name) for group, name in pairs)

    def speed(self) -> dict[str, Any]:
        """``images_per_second``, which no weights change, and ``device`` of the finished run; empty if not measured."""
        path = self.folder / "inference" / SPEED_FILE
        if not (self.is_finished and path.is_file()):
            return {}
        return _read_json(path, dict, "Remove it; the next evaluation measures the speed again.")

    def layers(self) -> StageRows:
        """Results of the decoder layers; empty if they were not measured at the end of the training."""
        path = self.folder / "inference" / "layers.json"
        if not (self.is_finished and path.is_file()):
            return []
        layers = decoder_layers(_read_rows(path))
        # The rows of an earlier checkpoint end in another result.
        return layers if layers and _is_result(layers[-1], self._scores()) else []

    def _scores(self) -> dict[str, Any]:
        """Scores of the last evaluation by task; empty if there is none."""
        path = self.folder / "inference" / "results.json"
        if not path.is_file():
            return {}
        results = _read_json(path, dict, "Remove it; the run is then evaluated again.")
        return {task: scores for task, scores in results.items() if task != "layers" and isinstance(scores, dict)}

    def _check_config(self) -> None:
        path = self.folder / "config.yaml"
        # A training that ended before its first iteration leaves nothing that another one could be confused with.
        if not (path.is_file() and (self.has_checkpoint or (self.folder / METRICS_FILE).is_file())):
            return
        found = differences(read_yaml(str(path)), self.cfg)
        if found:
            shown = "; ".join(found[:_MOST_DIFFERENCES])
            more = f"; and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
            raise ConfigError(
                f"{self.folder} holds a run of another configuration than {self.experiment.config_file} with the "
                f"given options: {shown}{more}. Give the options of that run, another --output, or remove the folder."
            )


def differences(of_run: Mapping[str, Any], cfg: Config) -> list[str]:
    """List the keys by which a run's recorded configuration differs from ``cfg`` in what is trained.

    A key that is newer than the run had its default value there. Keys that this version lacks are not compared.
    """
    given, wanted, defaults = dict(flatten(of_run)), _plain(cfg), _defaults()
    unknown = sorted(given.keys() - wanted.keys())
    if unknown:
        logger.info("Not compared, since this version has no such keys: %s", ", ".join(unknown))
    found = []
    for key in sorted(wanted.keys() - _FREE_KEYS):
        theirs, ours = given.get(key, defaults[key]), wanted[key]
        if key == "MODEL.WEIGHTS":  # the same file may be in another place
            theirs, ours = Path(theirs).name, Path(ours).name
        if theirs != ours:
            found.append(f"{key} is {theirs!r} there and {ours!r} here")
    return found


def seconds_per_iteration(folder: Path) -> float | None:
    """The median over the training in ``folder``; None if too few iterations were trained."""
    times = [record["time"] for _, record in records(folder / METRICS_FILE, '"time"')]
    return median(times) if times else None


def read_stages(path: Path) -> StageRows:
    """The rows of a ``layers.json``, or of the one in a run's folder.

    Raises UserError if there is none, or it holds something else, or the results beside it are of another evaluation.
    """
    file = path / "inference" / "layers.json" if path.is_dir() else path
    stages = _read_rows(file)
    results = file.with_name("results.json")
    if results.is_file() and not _agree(stages, _read_json(results, dict, f"Remove it, or {_BY_STAGE}")):
        raise UserError(f"{file} comes from another evaluation than {results}; {_BY_STAGE}")
    return stages


def decoder_layers(stages: StageRows) -> StageRows:
    """The stages that are decoder layers, in order."""
    return [row for row in stages if Stage.from_name(row["stage"]).kind == "layer"]


def _agree(stages: StageRows, results: Mapping[str, Any]) -> bool:
    """Whether the rows and the results come from the same evaluation, or end in the same final result."""
    by_stage = {f"{row['stage']}/{key}": row[key] for row in stages for key in stage_columns([row])}
    last = decoder_layers(stages)[-1:]
    return results.get("layers") == by_stage or (bool(last) and _is_result(last[0], results))


def _is_result(row: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether a stage has the scores of a final result."""
    tasks = [task for task in ("bbox", "panoptic_seg", "sem_seg") if task in results]
    return bool(tasks) and row.get(tasks[0]) == results[tasks[0]]


def _expected_scores(row: Mapping[str, Any]) -> list[str]:
    """The numbers that a stage must have, by the kind of its model."""
    found = [key for key in _SEGMENTATION_SCORES if key in row]
    if any(key in row for key in _MASK_SCORES[1:]):
        return [*_MASK_SCORES, *found]
    return [*_MASK_SCORES[:1], *found] if "box_AP" in row or not found else found


def _read_rows(file: Path) -> StageRows:
    if not file.is_file():
        raise UserError(f"{file} does not exist; {_BY_STAGE}")
    stages = _read_json(file, list, f"It is broken or not a layers.json; {_BY_STAGE}")
    for row in stages:
        try:
            Stage.from_name(str(row["stage"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} holds {row!r:.60}, which is not the result of a stage; {_BY_STAGE}") from error
        for key in _expected_scores(row):
            if not isinstance(row.get(key, ""), float | int | None):
                raise UserError(f"{file} has no number {key} for stage {row['stage']}; {_BY_STAGE}")
    return stages


@functools.cache
def _defaults() -> dict[str, Any]:
    return _plain(get_cfg())


def _read_json(path: Path, kind: type, advice: str) -> Any:
    """Read a JSON file that holds a ``kind``; a UserError otherwise, which ends with the advice."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not a complete JSON file ({error}). {advice}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}. {advice}")
    return content


def _plain(cfg: Config) -> dict[str, Any]:
    """Values by dotted key, with lists for tuples, which YAML does not have."""
    return {key: _listed(value) for key, value in flatten(cfg)}


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
