#!/usr/bin/env python
"""A local page to look at what runs find: drop an image in, move the threshold, choose a decoder layer, compare two.

Needs the package gradio: pip install "dimaskdino[browse]". The page is served to this machine alone.
"""

import argparse
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from dimaskdino.command_line import add_model_flags, at_least, fraction, import_modules, names_of_runs
from dimaskdino.cpu import keep_freed_memory
from dimaskdino.errors import UserError, require, run_cli


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    about = "run folders or saved models, two of which can be compared (default: the demo's model)"
    add("runs", nargs="*", type=Path, metavar="RUN", help=about)
    add("--score", type=fraction, default=0.35, help="threshold at the start (default: 0.35)")
    add("--port", type=at_least(1), default=7860, help="of the page (default: 7860)")
    add_model_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes end here, before the imports that take seconds

import numpy as np
from predict import demo_model

from dimaskdino import Predictor
from dimaskdino.prediction.refinement import Refinement
from dimaskdino.prediction.results import Prediction
from dimaskdino.structures.stages import Stage

TASKS = {"objects": "instances", "panoptic": "panoptic_seg", "semantic": "sem_seg"}
LAST = "last"
NO_RUN = "none"
CACHE_S = (600, 3600)  # how often gradio looks through its copies of files, and how old it lets them become


class Browser:
    """Predicts images with several runs, each image once, and draws what is asked for.

    Args:
        predictors: by the name of the run; they keep all scores, and the results of all stages.
    """

    def __init__(self, predictors: dict[str, Predictor]) -> None:
        self.predictors = predictors
        self._found = lru_cache(maxsize=2 * len(predictors))(self._predict)

    @property
    def layers(self) -> list[tuple[str, str]]:
        """Title and name of each stage that some run has, the last one first."""
        stages = {stage.name: stage.title for each in self.predictors.values() for stage in each.model.stages}
        return [("last", LAST), *((title, name) for name, title in stages.items())]

    @property
    def tasks(self) -> list[str]:
        """Tasks that some run has."""
        return [task for task, key in TASKS.items() if any(key in _given(each) for each in self.predictors.values())]

    def _predict(self, run: str, shape: tuple[int, ...], pixels: bytes) -> Prediction:
        return self.predictors[run](np.frombuffer(pixels, np.uint8).reshape(shape))

    def look(self, image: np.ndarray, run: str, layer: str, task: str, score: float) -> Prediction:
        """What a run finds in an image.

        Args:
            image: (H, W, 3) uint8 RGB.
            run: its name.
            layer: name of a stage, or :data:`LAST`.
            task: of :data:`TASKS`.
            score: least score of objects.

        Raises:
            UserError: the run has no such stage, or no results of the task.
        """
        known = {stage.name: stage.title for stage in self.predictors[run].model.stages}
        if layer not in (LAST, *known):  # the other run may have it
            raise UserError(f"{run} has no {Stage.from_name(layer).title}, but {', '.join(known.values())}.")
        found = self._found(run, image.shape, image.tobytes())
        found = found if layer == LAST else found.at(layer)
        if TASKS[task] not in found:
            known = ", ".join(name for name, key in TASKS.items() if key in found)
            raise UserError(f"{run} gives no {task} results, but {known}.")
        result = {TASKS[task]: found[TASKS[task]]}
        if task == "objects":
            result["instances"] = Refinement(score=score)(result["instances"], found.classes.things)
        return found.with_result(result)


def _given(predictor: Predictor) -> list[str]:
    """The results that a model gives."""
    node = predictor.cfg.MODEL.MaskDINO.TEST
    on = {"instances": node.INSTANCE_ON, "panoptic_seg": node.PANOPTIC_ON, "sem_seg": node.SEMANTIC_ON}
    return [key for key, given in on.items() if given]


def build_page(browser: Browser, score: float) -> Any:
    """The page, to be launched.

    Raises:
        UserError: gradio is missing.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # a local page tells nobody
    gradio: Any = require("gradio", "The page", "browse")

    def look(
        image: np.ndarray | None, first: str, second: str, layer: str, task: str, score: float
    ) -> tuple[Any, Any, list[str]]:
        compared = second != NO_RUN
        if image is None:
            return gradio.Image(None), gradio.Image(None, visible=compared), []
        try:
            found = {run: browser.look(image, run, layer, task, score) for run in (first, second) if run != NO_RUN}
        except UserError as error:
            raise gradio.Error(str(error)) from error
        files = save(found, folder.name)
        right = gradio.Image(files[-2], label=second, visible=True) if compared else gradio.Image(None, visible=False)
        return gradio.Image(files[0], label=first), right, files

    runs, folder = list(browser.predictors), tempfile.TemporaryDirectory(prefix="dimaskdino_")
    shown_as: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
    with gradio.Blocks(title="dimaskdino", fill_width=True, delete_cache=CACHE_S) as page:
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                image = gradio.Image(label="image", type="numpy", image_mode="RGB", height=240, buttons=[])
                first = gradio.Dropdown(runs, value=runs[0], label="run")
                second = gradio.Dropdown([NO_RUN, *runs], value=NO_RUN, label="compare with", visible=len(runs) > 1)
                layer = gradio.Dropdown(browser.layers, value=LAST, label="decoder layer")
                task = gradio.Radio(browser.tasks, value=browser.tasks[0], label="task", visible=len(browser.tasks) > 1)
                threshold = gradio.Slider(0, 1, value=score, step=0.01, label="threshold", buttons=[])
                files = gradio.File(label="download", file_count="multiple", interactive=False)
            with gradio.Column(scale=4), gradio.Row():
                left = gradio.Image(label=runs[0], min_width=480, **shown_as)
                right = gradio.Image(label=runs[-1], min_width=480, visible=False, **shown_as)
        given, shown = [image, first, second, layer, task, threshold], [left, right, files]
        gradio.on([each.change for each in given], look, given, shown, api_name="look", show_progress="minimal")
    return page


def save(found: dict[str, Prediction], folder: str) -> list[str]:
    """Write a picture and a JSON file for each run, which begin with its name; gradio keeps copies of them."""
    paths = []
    for run, each in found.items():
        picture, results = Path(folder, f"{run}.png"), Path(folder, f"{run}.json")
        each.draw().save(picture)
        results.write_text(each.to_json(), encoding="utf-8")
        paths += [str(picture), str(results)]
    return paths


def open_runs(args: argparse.Namespace) -> dict[str, Predictor]:
    """The predictors by the name of their run."""
    given = [(run, None) for run in args.runs] or [demo_model()]
    predictors = {
        name: Predictor(run, weights, options=args.opts, device=args.device, layers=["all"], score=0.0)
        for name, (run, weights) in zip(names_of_runs([run for run, _ in given]), given, strict=True)
    }
    keep_freed_memory(next(iter(predictors.values())).model.device.type)
    return predictors


def main() -> None:
    """Serve the page until Ctrl-C."""
    args = parse_args()
    import_modules(args.modules)
    page = build_page(Browser(open_runs(args)), args.score)
    try:
        page.launch(server_name="127.0.0.1", server_port=args.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port} is taken or does not exist; give another one.") from error


if __name__ == "__main__":
    run_cli(main)
