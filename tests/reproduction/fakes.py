"""Folders of runs as a training leaves them, without the training."""

import json
from pathlib import Path
from typing import Any

from dimaskdino.reproduction.runs import Run
from dimaskdino.reproduction.tables import find_experiment

CONFIGS = Path(__file__).parents[2] / "configs"


def open_run(
    output: Path, row: str = "neither", dataset: str = "shapes", options: tuple[str, ...] = (), seed: int | None = None
) -> Run:
    """Open the run of a table's row."""
    experiment = find_experiment(CONFIGS, dataset, row)
    assert experiment is not None
    return Run.open(experiment, output, options, seed=seed)


def scores(box: float, mask: float) -> dict[str, dict[str, float]]:
    """Results of a run: AP as given, AP by size one point apart; box AP as PQ, and mask AP as mIoU."""
    by_size = {
        task: {"AP": ap, "APs": ap - 1, "APm": ap + 1, "APl": ap + 2, "AP-car": ap, "AP50": ap + 9, "AP75": ap}
        for task, ap in (("bbox", box), ("segm", mask))
    }
    return by_size | {"panoptic_seg": {"PQ": box}, "sem_seg": {"mIoU": mask}}


def stage(name: str, box: float, mask: float) -> dict[str, Any]:
    """A row of layers.json."""
    return {"stage": name, "box_AP": box, "mask_AP": mask, "gap": box - mask, **scores(box, mask)}


def write_run(
    output: Path,
    dataset: str,
    row: str,
    *,
    box: float = 30.0,
    mask: float = 25.0,
    options: tuple[str, ...] = (),
    done: int | None = None,
    evaluated: bool = True,
    seconds: float = 0.5,
    first_layer: tuple[float, float] | None = None,
    speed: tuple[float, str] | None = (7.5, "a GPU"),
    seed: int | None = None,
    panoptic: bool = False,
) -> Path:
    """Write the folder of a run of ``row``.

    Args:
        output: folder of all runs.
        dataset: coco, bdd100k or shapes.
        row: of a table, as :attr:`Row.experiment` names it.
        box: box AP of the final result.
        mask: mask AP of the final result.
        options: keys on top of the file.
        done: trained iterations; None means all.
        evaluated: whether it was evaluated after them.
        seconds: of an iteration.
        first_layer: box and mask AP of decoder layer 0; None if stages were not evaluated.
        speed: images per second and the device; None if not measured.
        seed: of one of several runs of the row.
        panoptic: whether stages have PQ, which is the box AP.
    """
    empty = open_run(output, row, dataset, options, seed)
    folder, cfg = empty.folder, empty.cfg
    cfg.merge_from_list(["OUTPUT_DIR", str(folder)])
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    max_iter = cfg.SOLVER.MAX_ITER
    iterations = max_iter if done is None else done
    name = "model_final.pth" if iterations == max_iter else f"model_{iterations - 1:07d}.pth"
    (folder / "last_checkpoint").write_text(name)
    records: list[dict[str, Any]] = [{"iteration": i, "time": seconds, "total_loss": 1.0} for i in (19, 39)]
    if evaluated:
        records.append({"iteration": iterations, "panoptic_seg/PQ": box, "bbox/AP": box, "segm/AP": mask})
        (folder / "inference" / "results.json").write_text(json.dumps(scores(box, mask)))
    if evaluated and speed:
        (folder / "inference" / "speed.json").write_text(
            json.dumps({"images_per_second": speed[0], "device": speed[1]})
        )
    (folder / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    if first_layer:
        stages = [stage("interm", 1.0, 2.0), stage("layer.0", *first_layer), stage("layer.1", box, mask)]
        stages = [{**row, "PQ": row["box_AP"]} for row in stages] if panoptic else stages
        (folder / "inference" / "layers.json").write_text(json.dumps(stages))
    return folder
