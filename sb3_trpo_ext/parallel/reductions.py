"""Reductions over the processes of a data-parallel run: no-ops on one process.

Every process must call them in the same order, and then gets the same bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch as th
import torch.distributed as dist


def is_parallel() -> bool:
    """Whether there is more than one process to reduce over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if is_parallel() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_parallel() else 1


class Shares(NamedTuple):
    """The weight of each process in a mean over the samples of all processes: its share of the samples."""

    #: Samples of each process, the same list in all processes; ``None`` if all have the same number.
    counts: Sequence[int] | None = None

    @staticmethod
    def of(n_samples: int) -> "Shares":
        """The shares of all processes, by one exchange of their numbers of samples, each at least 1."""
        return Shares(all_gathered(th.tensor([n_samples])).tolist() if is_parallel() else None)

    def total(self, n_samples: int) -> int:
        """How many samples all processes have together, where this one has ``n_samples``."""
        return n_samples * world_size() if self.counts is None else sum(self.counts)

    def mean(self, tensor: th.Tensor) -> th.Tensor:
        """Mean of a tensor without a graph over all processes; ``tensor`` itself on one process."""
        if not is_parallel():
            return tensor
        return _reduced_(tensor * self.own(), dist.ReduceOp.SUM)

    def means(self, tensors: Sequence[th.Tensor]) -> Sequence[th.Tensor]:
        """Means of several tensors of one dtype and device in one exchange; ``tensors`` itself on one process."""
        if not is_parallel() or not tensors:
            return tensors
        flat = self.mean(th.cat([tensor.detach().reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def own(self) -> float:
        """The weight of this process."""
        return 1 / world_size() if self.counts is None else self.counts[rank()] / sum(self.counts)

    def minibatch_sizes(self, n_samples: int, batch_size: int) -> list[int]:
        """
        Cut a batch so that every process gets the same number of minibatches, and none of them is empty.

        Where all processes have the same number of samples, this is ``split(batch_size)``. Where they differ, ``batch_size``
        is the mean size per process, and a process with twice the samples has minibatches twice as large.

        :param n_samples: of this process
        :param batch_size: samples in a minibatch per process
        :return: the sizes, which add up to ``n_samples``
        """
        return _sizes(n_samples, batch_size, self.counts or [n_samples])

    def minibatch_weights(self, n_samples: int, batch_size: int) -> list[float]:
        """For each minibatch, its size in this process over that of the joint minibatch of all; 1 on one process."""
        counts = self.counts or [n_samples] * world_size()
        everyone = zip(*(_sizes(count, batch_size, counts) for count in counts), strict=True)
        return [sizes[rank()] / sum(sizes) for sizes in everyone]


def all_sum(tensor: th.Tensor) -> th.Tensor:
    """Sum of a tensor over all processes; ``tensor`` itself on one process."""
    return _reduced_(tensor.clone(), dist.ReduceOp.SUM) if is_parallel() else tensor


def all_max(tensor: th.Tensor) -> th.Tensor:
    """Largest value over all processes, entry by entry; ``tensor`` itself on one process."""
    return _reduced_(tensor.clone(), dist.ReduceOp.MAX) if is_parallel() else tensor


def all_true(condition: bool) -> bool:
    """Whether a condition holds on all processes, so that they take the same decision."""
    return bool(_reduced_(th.tensor(int(condition)), dist.ReduceOp.MIN)) if is_parallel() else condition


def all_gathered(tensor: th.Tensor) -> th.Tensor:
    """The tensors of all processes, of the same shape, concatenated along the first axis; ``tensor`` itself on one process."""
    if not is_parallel():
        return tensor
    mine = tensor.to(_device_for(tensor))
    gathered = [th.empty_like(mine) for _ in range(world_size())]
    with lost_connections_explained():
        dist.all_gather(gathered, mine)
    return th.cat(gathered).to(tensor.device)


def _sizes(n_samples: int, batch_size: int, counts: Sequence[int]) -> list[int]:
    """Sizes of the minibatches of a process."""
    if min(counts) == max(counts):
        return [batch_size] * (n_samples // batch_size) + [n_samples % batch_size] * (n_samples % batch_size > 0)
    n_minibatches = min(-(-sum(counts) // (batch_size * len(counts))), min(counts))
    small, n_large = divmod(n_samples, n_minibatches)
    return [small + 1] * n_large + [small] * (n_minibatches - n_large)


@th.no_grad()
def average_(gradient: th.Tensor, weight: float) -> None:
    """Average the gradients of a minibatch, each times its :meth:`Shares.minibatch_weights`, in place and in one exchange."""
    if is_parallel():
        gradient.copy_(_reduced_(gradient.mul_(weight), dist.ReduceOp.SUM))


@contextmanager
def lost_connections_explained() -> Iterator[None]:
    """Explain the error of an exchange that fails."""
    try:
        yield
    except RuntimeError as error:
        process = f"Process {dist.get_rank()} of {dist.get_world_size()}"
        raise RuntimeError(
            f"{process} has lost the connection to another one, which has died or was silent for longer than the timeout of "
            "the process group; look for the first error in the output of the others. The last checkpoint can be loaded; "
            "`torchrun --max-restarts` starts all processes again."
        ) from error


def _device_for(tensor: th.Tensor) -> th.device:
    """Where a tensor must be for an exchange."""
    is_gpu_only = tensor.device.type == "cpu" and dist.get_backend() == "nccl"
    return th.device("cuda", th.cuda.current_device()) if is_gpu_only else tensor.device


def _reduced_(tensor: th.Tensor, operation: "dist.ReduceOp.RedOpType") -> th.Tensor:
    """
    Reduce over all processes; the tensor may be overwritten.

    :param tensor: this process's value, a copy
    :param operation: how
    :return: the result, on the same device
    :raises RuntimeError: if a process is gone
    """
    sent = tensor.to(_device_for(tensor))
    with lost_connections_explained():
        if world_size() == 2 and sent.device.type == "cpu" and operation == dist.ReduceOp.SUM:
            # Gloo's ring passes small pieces one after the other. Each of two processes can send its whole tensor instead, as
            # many bytes: 0.9 ms instead of 2.5 ms on two cores for the gradient of a critic, 0.6 MB
            parts = [sent if rank() == source else th.empty_like(sent) for source in range(2)]
            for source, part in enumerate(parts):
                dist.broadcast(part, source)
            sent = parts[0].add_(parts[1])
        else:
            dist.all_reduce(sent, operation)
    return sent.to(tensor.device)
