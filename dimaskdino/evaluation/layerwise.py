"""Scores after every stage of the decoder: the detection-segmentation imbalance and how it closes."""

import csv
import itertools
import logging
import os
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from dimaskdino.evaluation.report import layer_table, stage_columns, stage_row, write_results

logger = logging.getLogger(__name__)


class LayerwiseEvaluator(DatasetEvaluator):
    """Evaluates the final results and those of every stage in the model's ``layers`` in one pass over the images.

    Writes ``layers.json`` and ``layers.csv`` next to the final stage's results.

    Args:
        final: evaluator of the final results; each stage gets one like it from ``for_stage``, read by ``score``.
        output_dir: where the tables go.
    """

    def __init__(self, *, final: Any, output_dir: str) -> None:
        self._final = final
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._final.reset()
        self._stages: dict[str, Any] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add a batch: the results of every image, and those of its ``layers`` (stage name to results)."""
        self._final.process(inputs, outputs)
        for image, output in zip(inputs, outputs, strict=True):
            for name, results in output["layers"].items():
                self._stage(name).process([image], [results])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score every stage.

        Returns:
            On the main process the final stage's scores by task, and ``layers``: ``<stage>/box_AP``,
            ``<stage>/mask_AP``, and ``<stage>/gap`` (box minus mask) in percent, the last two where masks are scored;
            ``<stage>/PQ`` and ``<stage>/mIoU`` where they are scored. On other processes an empty dict.
        """
        results = self._final.evaluate()
        rows = []
        for name in self._stage_names():
            scores = self._stage(name).score()
            if scores:
                rows.append(stage_row(name, scores))
        if not comm.is_main_process():
            return {}
        self._write(rows)
        logger.info("Scores by stage:\n%s", layer_table(rows))
        results["layers"] = {f"{row['stage']}/{key}": row[key] for row in rows for key in stage_columns([row])}
        return results

    def _stage(self, name: str) -> Any:
        if name not in self._stages:
            self._stages[name] = self._final.for_stage(name)
        return self._stages[name]

    def _stage_names(self) -> list[str]:
        """Stages in the model's order; a process that got no image knows none of them."""
        names = comm.all_gather(list(self._stages))
        return list(dict.fromkeys(itertools.chain.from_iterable(names)))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_results(rows, os.path.join(self._output_dir, "layers.json"))
        with open(os.path.join(self._output_dir, "layers.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, ["stage", *stage_columns(rows)], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
