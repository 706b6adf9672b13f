"""The state of a policy at some moment: tells whether it has changed since, and can restore it for a while."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.optim.vectors import assign_, flatten

#: The numbers of a tensor that are compared: to read so many takes a microsecond.
N_WATCHED = 1024


class Snapshot:
    """
    The parts and numbers of a policy.

    A change is noticed in a few microseconds, without a wait for an accelerator: an operation of PyTorch in place, by the
    tensor's version; new memory, by its address; a part of a module that is new, replaced or gone; a step of the policy's
    optimizer within :meth:`watching` (fused ones change no version); and on the CPU whatever else changes a number of a small
    tensor or one of a thousand numbers of a large one, such as ``param.data.clamp_(-1, 1)``. Plain attributes of modules are
    not looked at.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        self._policy = policy
        buffers = (buffer for buffer in policy.buffers() if buffer.is_floating_point() and buffer.layout is th.strided)
        self._tensors = [*policy.parameters(), *buffers]
        self._numbers = flatten(self._tensors)
        branches = [part for m in policy.modules() for part in (m._parameters, m._buffers, m._modules)]
        #: Dictionaries of parts, and what is in them.
        self._tree = [(branch, dict(branch)) for branch in branches]
        self._parts = [branch.values() for branch in branches]
        #: Numbers in the memory of the tensors, where NumPy can read it.
        self._views = [
            _some_numbers(tensor.detach().numpy())
            for tensor in self._tensors
            if tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.dtype != th.bfloat16
        ]
        self._versions, self._details = self._versions_now(), self._details_now()
        self._has_stepped = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice steps of the policy's optimizer within the block."""

        def notice(*_: Any) -> None:
            self._has_stepped = True

        # A hook of this optimizer alone: those of all optimizers must not change while another thread goes through them
        handle = self._policy.optimizer.register_step_post_hook(notice)
        try:
            yield
        finally:
            handle.remove()

    def is_of(self, policy: nn.Module, in_detail: bool = True) -> bool:
        """Whether a policy is the one of this snapshot, and has not changed since."""
        if policy is not self._policy or self._versions != self._versions_now():
            return False
        if in_detail and self._details != self._details_now():
            return False
        if self._has_stepped:
            self._has_stepped = not th.equal(flatten(self._tensors), self._numbers)
        return not self._has_stepped

    def _versions_now(self) -> list[int]:
        """What operations of PyTorch change."""
        return [number for tensor in self._tensors for number in (tensor._version, tensor.data_ptr())]

    def _details_now(self) -> list[Any]:
        """What else may change."""
        return [*map(id, itertools.chain.from_iterable(self._parts)), *(view.tobytes() for view in self._views)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give the policy the parts and numbers of this snapshot within the block."""
        if self.is_of(self._policy):
            yield
            return
        now = [(branch, dict(branch)) for branch, _ in self._tree]
        _fill(self._tree)
        numbers = flatten(self._tensors)
        assign_(self._tensors, self._numbers)
        try:
            yield
        finally:
            assign_(self._tensors, numbers)
            _fill(now)


def _some_numbers(array: np.ndarray) -> np.ndarray:
    """All numbers of a small array, and :data:`N_WATCHED` of a large one: a view."""
    if not array.flags.c_contiguous:
        # Its rows, flat, would be a copy
        return array[(slice(1),) * array.ndim]
    return array.reshape(-1)[:: math.ceil(array.size / N_WATCHED)]


def _fill(tree: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Restore the parts of all modules."""
    for branch, parts in tree:
        branch.clear()
        branch.update(parts)
