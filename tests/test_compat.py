"""What detectron2 0.5 or 0.6 needs: the process groups of a job, and no noise."""

import warnings
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from dimaskdino.compat import create_local_process_group, leave_process_group, silence_gathering


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
