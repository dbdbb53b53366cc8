"""The environment, the versions of libraries, and errors."""

import errno
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

import dimaskdino
from dimaskdino import model_zoo
from dimaskdino.compat import create_local_process_group, leave_process_group, silence_gathering
from dimaskdino.errors import ConfigError, run_cli
from tests.documentation import REPOSITORY


def test_report_names_versions_op_and_devices(capsys: pytest.CaptureFixture) -> None:
    runpy.run_module("dimaskdino.env", run_name="__main__")
    printed = capsys.readouterr().out
    report = dict(line.split(": ", 1) for line in printed.splitlines()[:5])
    assert report["dimaskdino"] == dimaskdino.__version__
    assert "compiled" in report["deformable attention"]
    assert "thread" in report["devices"]
    assert int(report["CPU cores"]) > 0
    assert f"OMP_NUM_THREADS={torch.get_num_threads()}" in report["variables"]
    assert torch.__version__ in printed


def raising(error: Exception):
    def main() -> None:
        raise error

    return main


def test_file_errors_are_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(raising(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x")))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: /root/x: Permission denied; check the path and its permissions.\n"
    with pytest.raises(SystemExit):
        run_cli(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))  # writing to an open file names none
    assert capsys.readouterr().err == "error: No space left on device; free some space, or write elsewhere.\n"


@pytest.mark.parametrize("error", [ConnectionError("closed by peer"), BrokenPipeError(), KeyError("x")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_cli(raising(error))


def _report_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    create_local_process_group(1)
    ranks = comm.all_gather((comm.get_rank(), comm.get_local_rank(), comm.get_local_size()))
    (folder / f"{rank}.txt").write_text(repr(ranks))
    leave_process_group()
    # Nothing of the job may remain: a second one in the same processes starts from scratch.
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{folder}/second", rank=rank, world_size=2)
    assert comm.all_gather(rank) == [0, 1]
    leave_process_group()


def test_local_ranks_start_at_zero_on_each_machine(tmp_path: Path) -> None:
    # Forked processes need not import torch anew.
    mp.start_processes(_report_ranks, args=(tmp_path,), nprocs=2, start_method="fork")
    expected = repr([(0, 0, 1), (1, 0, 1)])
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [expected] * 2


def test_gathering_results_does_not_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_gathering()
        for module in ("detectron2.utils.comm", "mine"):
            warnings.warn_explicit("TypedStorage is deprecated. It will be", UserWarning, "file.py", 1, module=module)
        warnings.warn_explicit("something else", UserWarning, "file.py", 1, module="detectron2.utils.comm")
    assert [str(warning.message)[:12] for warning in caught] == ["TypedStorage", "something el"]


def test_configuration_by_name() -> None:
    cfg = model_zoo.get_config("coco/dimaskdino_r50_12ep")
    assert cfg.MODEL.MaskDINO.TRANSFORMER_DECODER_NAME == "DIMaskDINODecoder"
    assert model_zoo.get_config_file("coco/maskdino_r50_12ep.yaml").is_file()
    names = model_zoo.config_names()
    assert {"coco/dimaskdino_r50_12ep", "ablation/coco/di_only", "dino/dino_r50_4scale_12ep"} <= set(names)
    assert not [name for name in names if "Base-" in name]


def test_unknown_name_gives_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"coco/dimaskdinno_r50_12ep.*coco/dimaskdino_r50_12ep"):
        model_zoo.get_config("coco/dimaskdinno_r50_12ep")


def test_build_copies_every_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "DIMASKDINO_BUILD_OP": "0"}
    subprocess.run(command, cwd=REPOSITORY, check=True, env=environment, capture_output=True)
    built = {path.relative_to(tmp_path / "dimaskdino").as_posix() for path in tmp_path.rglob("*.yaml")}
    assert built == {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert (tmp_path / "dimaskdino" / "model_zoo.py").is_file()


def test_installation_without_configurations_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_zoo, "_FOLDERS", (tmp_path / "configs",))
    with pytest.raises(ConfigError, match="configs"):
        model_zoo.get_config("coco/dimaskdino_r50_12ep")
