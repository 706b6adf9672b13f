"""What a rollout computes at its end, for a callback that looks at it before: tensors and a buffer that compute when asked."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

#: Arrays of a rollout buffer that are complete only when somebody asks.
_LAZY_ARRAYS = ("values", "log_probs", "rewards")
_EMPTY = th.empty(0)


class LazyTensor(th.Tensor):
    """The place of a tensor that is computed when anything of PyTorch or NumPy looks at it; from then on it is that tensor."""

    #: Returns the tensor.
    source: Callable[[], th.Tensor]

    @classmethod
    def of(cls, source: Callable[[], th.Tensor]) -> "LazyTensor":
        """
        Make a place for a tensor.

        :param source: returns the tensor, always the same one
        :return: its place
        """
        tensor = _EMPTY.as_subclass(cls)
        tensor.source = source
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """
        Call a function, method or attribute of PyTorch on the tensors themselves.

        :param func: what is called
        :param types: of the arguments
        :param args: of the call
        :param kwargs: of the call
        :return: what ``func`` returns
        """
        return func(*_present(args), **_present(kwargs or {}))


def _present(value: Any) -> Any:
    """
    Put tensors in their places.

    :param value: a lazy tensor, or some in lists, tuples and dicts, or anything else
    :return: the same with tensors that are there
    """
    if isinstance(value, LazyTensor):
        return value.source()
    if type(value) in (list, tuple):
        return type(value)(_present(part) for part in value)
    if type(value) is dict:
        return {key: _present(part) for key, part in value.items()}
    return value


class LazySteps:
    """
    Values and log-probabilities of the steps of a rollout.

    :param evaluate: values and log-probabilities of one step, of shapes ``(n_envs, 1)`` and ``(n_envs,)``
    """

    def __init__(self, evaluate: Callable[[int], tuple[th.Tensor, th.Tensor]]):
        self._evaluate = evaluate

    def at(self, step: int) -> tuple[LazyTensor, LazyTensor]:
        """
        Values and log-probabilities of a step.

        :param step: number of the step
        :return: lazy tensors of shapes ``(n_envs, 1)`` and ``(n_envs,)``
        """
        pair: list[th.Tensor] = []

        def part(index: int) -> th.Tensor:
            if not pair:
                pair.extend(self._evaluate(step))
            return pair[index]

        return LazyTensor.of(functools.partial(part, 0)), LazyTensor.of(functools.partial(part, 1))

    def finish(self, values: np.ndarray, log_probs: np.ndarray, device: th.device) -> None:
        """
        End a rollout: a tensor that somebody has kept must not be computed with a later policy.

        :param values: of all steps that are in the buffer, shape ``(n_steps, n_envs)``; not written to any more
        :param log_probs: the same shape
        :param device: where tensors are to be
        """

        def stored(step: int) -> tuple[th.Tensor, th.Tensor]:
            return th.tensor(values[step, :, None], device=device), th.tensor(log_probs[step], device=device)

        self._evaluate = stored


@contextmanager
def lazy_buffer(buffer: RolloutBuffer, complete: Callable[[], None]) -> Iterator[None]:
    """
    Let a buffer complete its values, log-probabilities and rewards whenever somebody asks for them.

    :param buffer: during a rollout
    :param complete: writes what is missing so far
    """
    original = type(buffer)
    vars(buffer)["_complete"] = complete
    buffer.__class__ = _lazy_class(original)
    try:
        yield
    finally:
        buffer.__class__ = original
        del vars(buffer)["_complete"]


@functools.cache
def _lazy_class(original: type[RolloutBuffer]) -> type[RolloutBuffer]:
    """
    The class that a buffer has during a rollout.

    :param original: its own class
    :return: a subclass
    """

    def reduce(self: Any, _: Any) -> Any:
        vars(self)["_complete"]()
        state = {name: value for name, value in vars(self).items() if name != "_complete"}
        # A copy and a pickle are of the original class, and complete
        return object.__new__, (original,), state

    members: dict[str, Any] = {name: _lazy_array(name) for name in _LAZY_ARRAYS}
    return type(original.__name__, (original,), {**members, "__reduce_ex__": reduce, "__module__": original.__module__})


def _lazy_array(name: str) -> property:
    """
    An array that is completed when somebody asks for it.

    :param name: of the array
    :return: the property
    """

    def get(self: Any) -> Any:
        vars(self)["_complete"]()
        return vars(self)[name]

    def put(self: Any, array: Any) -> None:
        vars(self)[name] = array

    return property(get, put)
