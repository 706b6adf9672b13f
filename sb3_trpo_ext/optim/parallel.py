"""Reductions over the processes of a data-parallel run: no-ops on one process."""

import torch as th
import torch.distributed as dist


def is_parallel() -> bool:
    """
    Whether there is more than one process to reduce over.

    :return: true under an initialised process group of two or more
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_mean(tensor: th.Tensor) -> th.Tensor:
    """
    Mean of a tensor over all processes, each with the same weight.

    :param tensor: this process's value, without a graph
    :return: the mean; ``tensor`` itself on one process
    """
    if not is_parallel():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
