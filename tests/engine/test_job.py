"""Two processes on the CPU, as the launcher starts them: what each knows, evaluates, saves, and refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dimaskdino.config import Config, get_cfg
from dimaskdino.data.datasets.registration import load_dataset
from dimaskdino.engine import GradientClipper
from dimaskdino.engine.hooks import average_running_statistics
from tests.engine.conftest import make_toy_cfg
from tests.engine.job import EVAL_PERIOD, MAX_ITER, Buffers, buffers_of, dice_of, evaluate_together, segmentation_scores
from tests.engine.sharded import CLIPPERS, GRADIENTS, KINDS

Results = Callable[[str], list[Any]]


def test_processes_know_each_other(of_two_processes) -> None:
    for rank, found in enumerate(of_two_processes("ranks")):
        assert found == {"rank": rank, "local": rank, "local_size": 2, "all": [0, 1]}


@pytest.mark.usefixtures("toy_cfg")  # registers the dataset, which tests of another file may have done otherwise
def test_one_process_reads_the_files_of_all(of_two_processes) -> None:
    first, second = of_two_processes("start_with_shared_files")
    assert (first.pop("reads"), second.pop("reads")) == (1, 0)
    assert first == second
    entries = [entry for entry in load_dataset("shapes_train") if entry["annotations"]]
    assert first["entries"] == repr(entries)
    assert len(first["groups"]) == len(entries) > 1


def test_every_process_imports_the_modules(of_two_processes) -> None:
    assert of_two_processes("import_modules") == [["MyBato", True, "MyBato"]] * 2


def test_processes_with_different_checkpoints_are_refused(of_two_processes, job_folder: Path) -> None:
    for rank, errors in enumerate(of_two_processes("start_from_own_folders")):
        without_checkpoint, without_flag, evaluated = errors
        for error in (without_checkpoint, evaluated):
            assert f"OUTPUT_DIR {job_folder / str(rank)}: process 0 finds model_0000004.pth, process 1 finds" in error
            assert "must be a folder that all machines share" in error
        assert "process 1 was not given --resume" in without_flag


def test_two_processes_score_like_one_to_the_last_digit(of_two_processes, shapes_root: Path, tmp_path: Path) -> None:
    two, none = of_two_processes("evaluate_together")
    one = evaluate_together(make_toy_cfg(shapes_root, tmp_path / "run"), tmp_path)
    tasks = {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert set(two) == {*tasks, "loss"}
    assert none == {"loss": two["loss"]}
    for task in tasks:
        assert repr(two[task]) == repr(one[task])
        assert 1 < one[task]["AP"] < 99
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)  # sums in another order


@pytest.mark.usefixtures("own_parts")
def test_own_evaluator_scores_two_processes_like_one(toy_cfg: Config, tmp_path: Path, of_two_processes) -> None:
    first, second = of_two_processes("evaluate_own")
    assert first["Dice"] == dice_of(toy_cfg, tmp_path)["Dice"]
    assert not second.get("Dice")


def test_processes_skip_a_step_together(of_two_processes) -> None:
    (skipped, first), (other, second) = of_two_processes("skip_together")
    assert skipped == other == 2  # ten iterations are almost three passes over seven images
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_variance_of_the_means_is_added(of_two_processes) -> None:
    for rank, (plain, frozen) in enumerate(of_two_processes("average_by_hand")):
        # Channel 0: both means are 3 from the common one, so 9 + (0.25 + 0.75) / 2. Channel 1: equal means add nothing.
        assert plain["running_mean"].tolist() == [1003.0, 2.0]
        assert plain["running_var"].tolist() == [9.5, 4.0]
        assert plain["num_batches_tracked"] == 7 + rank
        assert frozen["running_mean"].tolist() == [[1000.0, 2.0], [1006.0, 2.0]][rank]
        assert frozen["running_var"].tolist() == [[0.25, 3.0], [0.75, 5.0]][rank]


def test_common_statistics_are_evaluated_and_saved(of_two_processes, job_folder: Path) -> None:
    seen = of_two_processes("train_with_batch_norm")
    local = [process["local"] for process in seen]

    def expected(done: int) -> Buffers:
        """Mean, and second moment less the square of the mean, over both processes."""
        means = torch.stack([process[done]["running_mean"] for process in local]).double()
        variances = torch.stack([process[done]["running_var"] for process in local]).double()
        mean = means.mean(0)
        variance = (variances + means**2).mean(0) - mean**2
        return {
            "running_mean": mean.float(),
            "running_var": variance.float(),
            "num_batches_tracked": torch.tensor(done),
        }

    # The processes gather different statistics.
    assert not torch.allclose(local[0][MAX_ITER]["running_mean"], local[1][MAX_ITER]["running_mean"], rtol=1e-3)

    for process in seen:
        assert len(process["evaluated"]) == 2
        for done, found in zip((EVAL_PERIOD, MAX_ITER), process["evaluated"], strict=True):
            torch.testing.assert_close(found, expected(done), rtol=1e-5, atol=1e-7)
    for of_one, of_other in zip(*(process["evaluated"] for process in seen), strict=True):
        torch.testing.assert_close(of_one, of_other, rtol=0, atol=0)

    for name, done in {"model_0000001": 2, "model_0000003": 4, "model_final": MAX_ITER}.items():
        weights = torch.load(job_folder / "batch_norm" / f"{name}.pth")["model"]
        saved = {key.removeprefix("norm."): value for key, value in weights.items() if "running" in key}
        wanted = {key: value for key, value in expected(done).items() if "running" in key}
        torch.testing.assert_close(saved, wanted, rtol=1e-5, atol=1e-7)
    # An evaluation of the last file repeats the last evaluation of the training.
    last = {key: value for key, value in seen[0]["evaluated"][-1].items() if "running" in key}
    torch.testing.assert_close(saved, last, rtol=0, atol=0)


def test_one_process_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.rand(4, 3))
    before = buffers_of(norm)
    average_running_statistics(norm)
    torch.testing.assert_close(buffers_of(norm), before, rtol=0, atol=0)


def test_killed_job_goes_on_exactly(of_two_processes, job_folder: Path) -> None:
    for whole, *others in of_two_processes("kill_and_resume"):
        for other in others:
            torch.testing.assert_close(other, whole, rtol=0, atol=0)
    # The signal to one process stopped both.
    assert (job_folder / "signal" / "model_0000005.pth").is_file()


def test_segmentation_scores_of_two_processes_equal_those_of_one(of_two_processes, job_folder, tmp_path):
    of_main, of_other = of_two_processes("segmentation_scores")
    shutil.copytree(job_folder / "stuff", tmp_path / "stuff")
    alone = segmentation_scores(get_cfg(), tmp_path)
    assert of_other == {}
    assert repr(of_main) == repr(alone)  # to the last digit, with nan for classes that do not occur
    assert {*of_main, *of_main["layers"]} >= {"panoptic_seg", "sem_seg", "bbox", "segm", "layer.0/PQ", "layer.1/mIoU"}
    for task, metric in (("panoptic_seg", "PQ"), ("sem_seg", "mIoU"), ("segm", "AP")):
        assert 1 < alone[task][metric] < 99


# The norm of all gradients is a sum in another order: clipping scales all of them by a factor that is off by rounding.
ROUNDING = {"rtol": 1e-4, "atol": 1e-7}


@pytest.fixture
def saved(of_two_processes: Results, job_folder: Path) -> Callable[[str], dict[str, Any]]:
    """Reads the final checkpoint of one of the trainings."""
    of_two_processes("shard")
    return lambda name: torch.load(job_folder / name / "model_final.pth")


def state_of(content: dict[str, Any]) -> dict[str, Any]:
    """Weights, their average, and the optimizer's state with its settings."""
    return {name: content[name] for name in ("model", "model_ema")} | content["trainer"]["step"]["optimizer"]


def test_sharding_trains_and_saves_as_without(saved: Callable[[str], dict[str, Any]]) -> None:
    plain, optimizer, full = (saved(f"shared_{kind}") for kind in KINDS)
    torch.testing.assert_close(state_of(optimizer), state_of(plain), rtol=0, atol=0)
    torch.testing.assert_close(state_of(full), state_of(plain), **ROUNDING)
    assert plain.keys() == optimizer.keys() == full.keys()
    assert list(plain["model"]) == list(optimizer["model"]) == list(full["model"])


def test_parts_of_a_batch_in_bfloat16_add_up(saved: Callable[[str], dict[str, Any]]) -> None:
    torch.testing.assert_close(state_of(saved("parts_full")), state_of(saved("parts_")), **ROUNDING)


def test_run_goes_on_with_another_sharding(saved: Callable[[str], dict[str, Any]]) -> None:
    plain = state_of(saved("longer"))
    torch.testing.assert_close(state_of(saved("resumed_optimizer")), plain, rtol=0, atol=0)
    torch.testing.assert_close(state_of(saved("resumed_full")), plain, **ROUNDING)


def test_each_process_has_half_of_the_moments(of_two_processes: Results) -> None:
    found = of_two_processes("shard")
    whole = found[0][""]["moments"]
    for kind in ("optimizer", "full"):
        shares = [each[kind]["moments"] for each in found]
        assert sum(shares) == whole
        assert max(shares) < 0.6 * whole


def test_processes_evaluate_other_numbers_of_images(of_two_processes: Results) -> None:
    results = of_two_processes("shard")[0]["full"]["results"]
    assert {"bbox", "segm", "ema"} <= set(results)


def test_one_process_can_use_the_whole_weights_alone(of_two_processes: Results) -> None:
    found, expected = of_two_processes("shard")[0]["full"]["scores"]
    assert len(found) == 6
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_in_parts_are_clipped_as_whole_ones(of_two_processes: Results) -> None:
    for found in of_two_processes("clip_sharded"):
        given = iter(found)
        for kind, limit in CLIPPERS:
            for norm_type in (2.0, torch.inf):
                parameters = [nn.Parameter(torch.tensor(each)) for each in GRADIENTS]
                for parameter in parameters:
                    parameter.grad = parameter.detach().clone()
                norm = GradientClipper(clip_type=kind, limit=limit, norm_type=norm_type)(parameters)
                torch.testing.assert_close(next(given), (norm, [parameter.grad for parameter in parameters]))
