"""A run's folder: how far it came, whether it is what its configuration file says, what it measured."""

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from dimaskdino.config import Config, get_cfg
from dimaskdino.errors import ConfigError, UserError
from dimaskdino.evaluation.speed import SPEED_FILE
from dimaskdino.reproduction.experiments import Experiment
from dimaskdino.reproduction.tables import Table, Values
from dimaskdino.structures.stages import Stage
from dimaskdino.yaml_files import read_yaml

logger = logging.getLogger(__name__)

# How and where a run is made, not what it trains.
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
_TAIL_BYTES = 2**18
_STAGE_SCORES = ("box_AP", "mask_AP", "gap")
_BY_STAGE = (
    "evaluate the run by stage: train_net.py --config-file FILE --eval-only --resume --eval-layers all OUTPUT_DIR RUN"
)


@dataclass(frozen=True, eq=False)
class Run:
    """An experiment and the folder that its training writes to, which may not exist yet.

    Attributes:
        experiment: what is trained.
        folder: OUTPUT_DIR.
        cfg: the experiment's file and the options.
        options: keys and values on top of the file, as on a command line.
    """

    experiment: Experiment
    folder: Path
    cfg: Config
    options: tuple[str, ...]

    @classmethod
    def open(cls, experiment: Experiment, output: Path, options: Sequence[str] = ()) -> "Run":
        """The run of ``experiment`` under ``output``.

        Raises:
            ConfigError: the folder holds a run of another configuration.
        """
        cfg = get_cfg()
        cfg.merge_from_file(str(experiment.config_file))
        cfg.merge_from_list(list(options))
        run = cls(experiment, output / experiment.dataset / experiment.name, cfg, tuple(options))
        run._check_config()
        return run

    @property
    def max_iter(self) -> int:
        """Iterations of the whole training."""
        return self.cfg.SOLVER.MAX_ITER

    @property
    def has_checkpoint(self) -> bool:
        """Whether a training can go on here."""
        return (self.folder / "last_checkpoint").is_file()

    @property
    def iterations_done(self) -> int:
        """Iterations that the last checkpoint holds."""
        if not self.has_checkpoint:
            return 0
        found = re.search(r"model_(\d+)", (self.folder / "last_checkpoint").read_text())
        return int(found[1]) + 1 if found else self.max_iter

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end and evaluated there."""
        path = self.folder / "metrics.json"
        if not (path.is_file() and self._scores()):
            return False
        evaluated = [record["iteration"] for record in _records(path, '"bbox/AP"', last_bytes=_TAIL_BYTES)]
        return bool(evaluated) and evaluated[-1] >= self.max_iter

    @property
    def iterations_left(self) -> int:
        """Iterations that are not trained yet."""
        return 0 if self.is_finished else max(self.max_iter - self.iterations_done, 0)

    @property
    def status(self) -> str:
        """``finished``, ``not run``, or how far it came."""
        if self.is_finished:
            return "finished"
        if self.iterations_done >= self.max_iter:
            return "not evaluated"
        if self.iterations_done:
            return f"stopped at {self.iterations_done} of {self.max_iter}"
        return "not run"

    def seconds_per_iteration(self) -> float | None:
        """The median over the training, or None where too little was trained to tell."""
        path = self.folder / "metrics.json"
        times = [record["time"] for record in _records(path, '"time"')] if path.is_file() else []
        return median(times) if times else None

    def results(self, table: Table) -> Values:
        """What ``table`` measures, AP in percent, speed in images per second; None for what was not measured."""
        if not self.is_finished:
            return (None,) * len(table.metrics)
        scores = self._scores()
        if table.needs_layers:
            layers = self.layers()
            scores = {"first": layers[0], "last": layers[-1]} if layers else {}
        scores["speed"] = self.speed()
        pairs = [metric.split("/") for metric in table.metrics]
        return tuple(scores.get(group, {}).get(name) for group, name in pairs)

    def speed(self) -> dict[str, Any]:
        """``images_per_second`` and ``device`` of the finished run; empty where they were not measured.

        They do not depend on the weights, so that any evaluation of this configuration may have measured them.
        """
        path = self.folder / "inference" / SPEED_FILE
        if not (self.is_finished and path.is_file()):
            return {}
        return _read_json(path, dict, "Remove it; the next evaluation measures the speed again.")

    def layers(self) -> list[dict[str, Any]]:
        """Results of the decoder layers of the finished run; empty where they were not measured after its training."""
        path = self.folder / "inference" / "layers.json"
        if not (self.is_finished and path.is_file()):
            return []
        layers = decoder_layers(_read_rows(path))
        # Those of an earlier checkpoint end in another result.
        return layers if layers and layers[-1].get("bbox") == self._scores()["bbox"] else []

    def _scores(self) -> dict[str, Any]:
        """The last evaluation's results; empty where there is none, or none of boxes or masks."""
        path = self.folder / "inference" / "results.json"
        if not path.is_file():
            return {}
        scores = _read_json(path, dict, "Remove it; the run is then evaluated again.")
        return scores if all(scores.get(task) and isinstance(scores[task], dict) for task in ("bbox", "segm")) else {}

    def _check_config(self) -> None:
        path = self.folder / "config.yaml"
        # A training that ended before its first iteration leaves nothing that could be mixed up.
        if not (path.is_file() and (self.has_checkpoint or (self.folder / "metrics.json").is_file())):
            return
        found = differences(read_yaml(str(path)), self.cfg)
        if found:
            shown = "; ".join(found[:_MOST_DIFFERENCES])
            more = f"; and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
            raise ConfigError(
                f"{self.folder} holds a run of another configuration than {self.experiment.config_file} with the "
                f"options given here: {shown}{more}. Give its options, another --output, or remove the folder."
            )


def differences(of_run: Mapping[str, Any], cfg: Config) -> list[str]:
    """Keys by which a run's written configuration is another training than ``cfg``.

    A key that is newer than the run has its default there. Keys that this version does not know are not compared.

    Returns:
        For each key, sorted, its name and both values.
    """
    given, wanted, defaults = dict(_leaves(of_run)), _plain(cfg), _defaults()
    unknown = sorted(given.keys() - wanted.keys())
    if unknown:
        logger.info("Not compared, since this version has no such keys: %s", ", ".join(unknown))
    found = []
    for key in sorted(wanted.keys() - _FREE_KEYS):
        theirs, ours = given.get(key, defaults[key]), wanted[key]
        if key == "MODEL.WEIGHTS":
            # The same file may lie elsewhere.
            theirs, ours = Path(theirs).name, Path(ours).name
        if theirs != ours:
            found.append(f"{key} is {theirs!r} there and {ours!r} here")
    return found


def read_stages(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``layers.json``, or of the one in a run's folder.

    Raises:
        UserError: there is none, the file holds something else, or the results beside it are of another evaluation.
    """
    file = path / "inference" / "layers.json" if path.is_dir() else path
    stages = _read_rows(file)
    results = file.with_name("results.json")
    if results.is_file() and not _are_of(stages, _read_json(results, dict, f"Remove it, or {_BY_STAGE}")):
        raise UserError(f"{file} is of another evaluation than {results}, as of an earlier training; {_BY_STAGE}")
    return stages


def _are_of(stages: list[dict[str, Any]], results: Mapping[str, Any]) -> bool:
    """Whether the rows are of the model that was evaluated last: by stage then, or with the same final result."""
    by_stage = {f"{row['stage']}/{key}": row.get(key) for row in stages for key in _STAGE_SCORES}
    last = decoder_layers(stages)[-1:]
    return results.get("layers") == by_stage or (bool(last) and last[0].get("bbox") == results.get("bbox"))


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file} does not exist; {_BY_STAGE}")
    stages = _read_json(file, list, f"It is no layers.json, or broken: {_BY_STAGE}")
    for row in stages:
        if not isinstance(row, dict) or not _is_stage(str(row.get("stage"))):
            raise UserError(f"{file} holds {row!r:.60}, which is no result of a stage; {_BY_STAGE}")
        for key in _STAGE_SCORES:
            if not isinstance(row.get(key, ""), float | int | None):
                raise UserError(f"{file} has no number {key} of stage {row['stage']}; {_BY_STAGE}")
    return stages


def decoder_layers(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages that are decoder layers, in their order."""
    return [row for row in stages if Stage.from_name(row["stage"]).kind == "layer"]


def _is_stage(name: str) -> bool:
    try:
        Stage.from_name(name)
    except ValueError:
        return False
    return True


@functools.cache
def _defaults() -> dict[str, Any]:
    return _plain(get_cfg())


def _read_json(path: Path, kind: type, advice: str) -> Any:
    """The content of a JSON file, which must be of a kind; the UserError otherwise ends with the advice."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file ({error}). {advice}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} holds a {type(content).__name__} where a {kind.__name__} belongs. {advice}")
    return content


def _records(path: Path, holding: str, *, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.json that hold a text, of all or of its end; one that is broken is left out."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - last_bytes, 0) if last_bytes else 0)
        lines = file.read().decode(errors="replace").splitlines()
    found, broken = [], 0
    for line in lines:
        # A line that does not begin or end as a record is cut: here, or by a training that is writing it.
        if holding in line and line.startswith("{") and line.endswith("}"):
            try:
                found.append(json.loads(line))
            except ValueError:
                broken += 1
    if broken:
        _warn_of_broken_lines(path, broken)
    return found


@functools.cache
def _warn_of_broken_lines(path: Path, count: int) -> None:
    """Once, however often a file is read."""
    logger.warning("%s: %d broken lines are left out, as a crash of a training leaves them.", path, count)


def _plain(cfg: Config) -> dict[str, Any]:
    """Values by dotted key as YAML holds them: it knows no tuples."""
    return dict(_leaves(yaml.safe_load(cfg.dump())))


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
