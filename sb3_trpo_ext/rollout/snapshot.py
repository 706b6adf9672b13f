"""The state of a policy at some moment: tells whether it has changed since, and can restore it for a while."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn

from sb3_trpo_ext.optim.vectors import assign_, flatten


class Snapshot:
    """
    The parts and numbers of a policy.

    A change is noticed in a few microseconds, without a wait for an accelerator: an operation of PyTorch in place, by the
    tensor's version; new memory, by its address; a part of a module that is new, replaced or gone; a step of the policy's
    optimizer within :meth:`watching` (fused ones change no version); and on the CPU whatever else changes the first number of
    a tensor, such as ``param.data.mul_(0.5)``. Plain attributes of modules are not looked at.

    :param policy: the policy
    """

    def __init__(self, policy: nn.Module):
        self._policy = policy
        self._tensors = [*policy.parameters(), *(buffer for buffer in policy.buffers() if buffer.is_floating_point())]
        self._numbers = flatten(self._tensors)
        branches = [part for m in policy.modules() for part in (m._parameters, m._buffers, m._modules)]
        #: Dictionaries of parts, and what is in them.
        self._tree = [(branch, dict(branch)) for branch in branches]
        self._parts = [branch.values() for branch in branches]
        self._ids = self._ids_now()
        #: The same memory as that of the tensors.
        self._arrays = [
            _array(tensor)
            for tensor in self._tensors
            if tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.is_contiguous()
        ]
        self._versions, self._details = self._versions_now(), self._details_now()
        self._has_stepped = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice steps of the policy's optimizer within the block."""

        def notice(*_: Any) -> None:
            self._has_stepped = True

        optimizer = getattr(self._policy, "optimizer", None)
        # A hook of this optimizer alone: those of all optimizers must not change while another thread goes through them
        handle = optimizer.register_step_post_hook(notice) if isinstance(optimizer, th.optim.Optimizer) else None
        try:
            yield
        finally:
            if handle is not None:
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

    def has_parts_of(self, other: "Snapshot") -> bool:
        """Whether two snapshots differ by numbers at most."""
        return self._policy is other._policy and self._ids == other._ids

    def _versions_now(self) -> list[int]:
        """What operations of PyTorch change."""
        return [number for tensor in self._tensors for number in (tensor._version, tensor.data_ptr())]

    def _details_now(self) -> list[Any]:
        """What else may change."""
        return [*self._ids_now(), *(array[0] for array in self._arrays)]

    def _ids_now(self) -> list[int]:
        """What changes with the parts."""
        return list(map(id, itertools.chain.from_iterable(self._parts)))

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


def _array(tensor: th.Tensor) -> Any:
    """The numbers of a tensor on the CPU, in its own memory."""
    flat = tensor.detach().reshape(-1)
    try:
        return memoryview(flat.numpy())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return memoryview(flat.view(th.uint8).numpy())  # type: ignore[arg-type]


def _fill(tree: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Restore the parts of all modules."""
    for branch, parts in tree:
        branch.clear()
        branch.update(parts)
