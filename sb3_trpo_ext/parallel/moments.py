"""Count, mean and variance that can be joined, subtracted and reduced over processes without the samples."""

from typing import NamedTuple

import torch as th

from sb3_trpo_ext.parallel.reductions import all_sum, is_parallel


class Moments(NamedTuple):
    """Moments of a set of samples, in double precision."""

    #: Number of samples; need not be whole. A scalar.
    n: th.Tensor
    #: Any shape.
    mean: th.Tensor
    #: Sum of the squared deviations from the mean, the same shape.
    m2: th.Tensor

    @property
    def variance(self) -> th.Tensor:
        """Mean squared deviation."""
        return self.m2 / self.n


def moments_of(samples: th.Tensor) -> Moments:
    """Moments over the first axis of samples of shape ``(n_samples, ...)``."""
    samples = samples.double()
    mean = samples.mean(dim=0)
    return Moments(mean.new_full((), len(samples)), mean, (samples - mean).square().sum(dim=0))


def joined(first: Moments, second: Moments) -> Moments:
    """Moments of two sets of samples together (Chan, Golub & LeVeque 1983, equation 2.1)."""
    count = first.n + second.n
    shift, share = second.mean - first.mean, second.n / count
    m2 = first.m2 + second.m2 + shift.square() * first.n * share
    return Moments(count, first.mean + shift * share, m2)


def difference(total: Moments, part: Moments) -> Moments:
    """Moments of what was added to a set of samples: the inverse of :func:`joined`."""
    count = total.n - part.n
    if count <= 0:
        return Moments(th.zeros_like(count), th.zeros_like(total.mean), th.zeros_like(total.m2))
    # Relative to the mean before, which keeps what cancels small
    shift = (total.mean - part.mean) * (total.n / count)
    m2 = total.m2 - part.m2 - shift.square() * part.n * (count / total.n)
    # Rounding leaves a remainder of either sign where there is no variance
    return Moments(count, part.mean + shift, m2.clamp(min=0))


def all_joined(part: Moments) -> Moments:
    """
    Moments of the samples of all processes together.

    Two exchanges: the squared deviations are taken from the joint mean, so that nothing cancels.

    :param part: of this process, may be empty if that of another is not
    :return: of all; ``part`` itself on one process
    """
    if not is_parallel():
        return part
    sums = all_sum(th.cat([part.n.reshape(1), (part.n * part.mean).flatten()]))
    mean = (sums[1:] / sums[0]).view(part.mean.shape)
    return Moments(sums[0], mean, all_sum(part.m2 + part.n * (part.mean - mean).square()))


def all_moments(samples: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Mean and standard deviation over the samples of all processes.

    :param samples: of this process, shape ``(n_samples,)``
    :return: two scalars; the standard deviation with ``n - 1``, as PyTorch has it
    """
    if not is_parallel():
        return samples.mean(), samples.std()
    total = all_joined(moments_of(samples))
    std = (total.m2 / (total.n - 1)).sqrt()
    return total.mean.to(samples.dtype), std.to(samples.dtype)
