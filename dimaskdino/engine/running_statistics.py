"""One set of running statistics of batch norm for the whole job, where each process has kept its own."""

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn


class AverageRunningStatistics(HookBase):
    """Calls :func:`average_running_statistics` before whatever uses the statistics: evaluations and checkpoints.

    Register it in every process, before the hooks that evaluate and save; those may be the main process's alone.
    The last iteration counts as due: what follows it, in ``after_train`` too, finds the averages.

    Args:
        model: that is trained; may be wrapped for distribution.
        periods: iterations from one use to the next, one number for each kind of use; 0 for none but the last.
    """

    def __init__(self, model: nn.Module, *, periods: tuple[int, ...]) -> None:
        self._model = model
        self._periods = tuple(period for period in periods if period > 0)

    def after_step(self) -> None:
        """Average where this iteration's model will be evaluated or saved."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            average_running_statistics(self._model)


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give the batch norms of ``model`` in every process the running statistics of what all processes have seen.

    Each process describes its own share of the images by a mean and a variance. The shares are of one size, so that
    the whole has the mean of the means, and as variance E[x^2] - E[x]^2: the mean of the variances plus the variance of
    the means. The mean of the variances alone would be too small where the shares differ, as they do in short runs
    and with few images per process. The second term is computed from the distances to the common mean, which in
    float32 neither cancels nor becomes negative.

    Training is not changed: it normalises by the batch. Counters of batches are equal already and stay. Frozen
    batch norm is not touched, synchronised batch norm finds its own values again.

    All processes must call this, with the same model; in one process, and without such layers, nothing is done.
    """
    statistics = _running_statistics(model)
    if comm.get_world_size() == 1 or not statistics:
        return
    means = torch.cat([mean for mean, _ in statistics]).float()
    variances = torch.cat([variance for _, variance in statistics]).float()
    common_mean = _average(means)
    common_variance = _average(variances + (means - common_mean).square())
    sizes = [len(mean) for mean, _ in statistics]
    common = zip(common_mean.split(sizes), common_variance.split(sizes), strict=True)
    for (mean, variance), (new_mean, new_variance) in zip(statistics, common, strict=True):
        mean.copy_(new_mean)
        variance.copy_(new_variance)


def _running_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running mean and variance of each batch norm (instance norm too) that keeps them.

    The frozen ones of detectron2 and timm are other classes.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    statistics = [(norm.running_mean, norm.running_var) for norm in norms]
    return [(mean, variance) for mean, variance in statistics if mean is not None and variance is not None]


def _average(values: Tensor) -> Tensor:
    """Over the processes; the same bits in each."""
    total = values.clone()
    dist.all_reduce(total)
    return total / comm.get_world_size()
