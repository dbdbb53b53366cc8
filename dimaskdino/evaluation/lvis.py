"""LVIS's average precision: each image is labeled for some classes alone; rare, common, and frequent classes."""

import contextlib
import io
import math

import hotcoco

from dimaskdino.evaluation.coco import CocoEvaluator, Result, Scores

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300")


class LvisEvaluator(CocoEvaluator):
    """As :class:`CocoEvaluator`, with LVIS's rules.

    Up to 300 detections of an image count. Detections of a class that neither has an object in an image nor is in its
    neg_category_ids are not counted; nor are those of not_exhaustive_category_ids that match no object.

    Source: LVIS (Gupta et al., 2019).
    """

    def _scores(self, results: list[Result], task: str, seen: list[int] | None) -> Scores:
        coco = self._truth.coco
        evaluation = hotcoco.COCOeval(coco, coco.load_res(self._numbered(results, task)), task, lvis_style=True)
        if seen is not None:
            evaluation.params.img_ids = seen
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()):  # It prints its table, which the log has as well.
            evaluation.summarize()
        found = evaluation.get_results()
        scores = {name: 100 * found[name] if found[name] > -1 else math.nan for name in _METRICS}
        self._check_measured(scores, seen)
        return scores
