"""Optimizer steps that are kept as a whole or undone."""

import copy
from collections.abc import Iterable

import torch as th


class Transaction:
    """
    Steps of an optimizer that are undone, bit by bit, unless they are committed before the ``with`` block ends.

    An exception undoes them too. Gradients are dropped in any case.

    :param tensors: what the steps change
    :param optimizer: what makes the steps
    """

    def __init__(self, tensors: Iterable[th.Tensor], optimizer: th.optim.Optimizer):
        self._optimizer = optimizer
        self._old = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._old_state = copy.deepcopy(optimizer.state_dict())
        self._is_committed = False

    def commit(self) -> None:
        """Keep the steps."""
        self._is_committed = True

    def __enter__(self) -> "Transaction":
        return self

    @th.no_grad()
    def __exit__(self, *_: object) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if not self._is_committed:
            for tensor, old in self._old:
                tensor.copy_(old)
            self._optimizer.load_state_dict(self._old_state)
