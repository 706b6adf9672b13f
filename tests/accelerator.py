"""A simulated accelerator: its tensors are on a device of their own, and the CPU computes their numbers.

It is as strict as a GPU about what lies where: an operator that gets a tensor of the host beside one of the device raises,
unless the former is a single number, and ``numpy`` is refused. And it counts, by the function of the package that is running,
each time that the host waits for a number of the device, and each transfer to the device. What it cannot tell is how a GPU
rounds, how fast one is, and whether the branches for ``device.type == "cuda"`` are right (pinned memory, the random state of a
GPU, NCCL).

Importing this module registers the device ``"sim"`` with PyTorch (its interface for backends written in Python), for good.
"""

import collections
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
#: Operators that take a tensor from one device to another.
_TRANSFERS = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
#: Operators whose result, or the shape of it, the host has to know.
_READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select")


def _lstm_cell(
    inputs: th.Tensor,
    hidden: th.Tensor,
    cell: th.Tensor,
    input_bias: th.Tensor | None = None,
    hidden_bias: th.Tensor | None = None,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """One step of an LSTM, as the kernel of a GPU without cuDNN makes it: hidden state, cell, and gates for the derivative."""
    gates = inputs + hidden + sum(bias for bias in (input_bias, hidden_bias) if bias is not None)
    entry, forget, new, out = gates.chunk(4, dim=1)
    entry, forget, new, out = entry.sigmoid(), forget.sigmoid(), new.tanh(), out.sigmoid()
    cell = forget * cell + entry * new
    return out * cell.tanh(), cell, th.cat([entry, forget, new, out], dim=1)


def _lstm_cell_backward(
    slope: th.Tensor | None,
    cell_slope: th.Tensor | None,
    before: th.Tensor,
    after: th.Tensor,
    gates: th.Tensor,
    has_bias: bool,
) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
    """The gradient in gates, cell and bias."""
    entry, forget, new, out = gates.chunk(4, dim=1)
    slope = th.zeros_like(before) if slope is None else slope
    cell_slope = th.zeros_like(before) if cell_slope is None else cell_slope
    inner = cell_slope + slope * out * (1 - after.tanh().square())
    gradient = th.cat(
        [
            inner * new * entry * (1 - entry),
            inner * before * forget * (1 - forget),
            inner * entry * (1 - new.square()),
            slope * after.tanh() * out * (1 - out),
        ],
        dim=1,
    )
    return gradient, inner * forget, gradient.sum(0) if has_bias else None


#: Operators of which PyTorch expects a backend to have its own.
_KERNELS: dict[str, Callable[..., Any]] = {
    "aten::convolution_overrideable": th.ops.aten.convolution.default,
    "aten::convolution_backward_overrideable": th.ops.aten.convolution_backward.default,
    "aten::_thnn_fused_lstm_cell": _lstm_cell,
    "aten::_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
}


class Traffic(collections.Counter[str]):
    """How often the host waited for the device, by ``file.function`` of the package."""

    def __init__(self) -> None:
        super().__init__()
        #: Transfers to the device, by the same names.
        self.sent: collections.Counter[str] = collections.Counter()


_traffic: list[Traffic] = []
_has_float64 = True


@contextmanager
def without_float64() -> Iterator[None]:
    """Refuse double precision in a ``with`` block, which Apple's GPUs do not have."""
    global _has_float64
    _has_float64 = False
    try:
        yield
    finally:
        _has_float64 = True


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count in a ``with`` block."""
    traffic = Traffic()
    _traffic.append(traffic)
    try:
        yield traffic
    finally:
        _traffic.remove(traffic)


def _caller() -> str:
    """The innermost function of the package that is running."""
    for frame in reversed(traceback.extract_stack()):
        if "/sb3_trpo_ext/" in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[-1].removesuffix('.py')}.{frame.name}"
    return "outside"


def _count(is_read: bool) -> None:
    """Take note of a transfer."""
    for traffic in _traffic:
        (traffic if is_read else traffic.sent)[_caller()] += 1


class DeviceTensor(th.Tensor):
    """A tensor of the device, around one of the CPU that has the numbers."""

    on_cpu: th.Tensor
    __torch_function__ = th._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, on_cpu: th.Tensor) -> "DeviceTensor":
        outer: DeviceTensor = th.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=th.device(NAME, 0),
        )
        outer.on_cpu = on_cpu
        return outer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        return _run(function, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be saved as the numbers, which PyTorch puts where they are wanted when they are loaded."""
        return self.on_cpu.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> th.Tensor:
        """Be copied without PyTorch's look at the memory, which is not there."""
        copied = self.detach().clone()
        copied = th.nn.Parameter(copied) if isinstance(self, th.nn.Parameter) else copied
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied

    def tolist(self) -> Any:
        """Read all numbers, which PyTorch refuses to do for a class of somebody else's."""
        _count(is_read=True)
        return self.detach().on_cpu.tolist()  # type: ignore[attr-defined]


def _leaves(value: Any) -> Iterator[Any]:
    """The arguments of an operator, and what is in those that are lists."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists and tuples of something else. PyTorch's `tree_map` takes longer than the operators."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, part) for part in value])
    return change(value)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU, after what a GPU would have refused."""
    name = function._schema.name
    tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, th.Tensor)]
    ours = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
    on_host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if name not in _TRANSFERS and ours and any(tensor.dim() > 0 for tensor in on_host):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {[t.device for t in tensors]}")

    device = kwargs.get("device")
    if name == "aten::copy_":
        is_ours = isinstance(args[0], DeviceTensor)
    else:
        is_ours = bool(ours) if device is None else th.device(device).type == NAME
    if name in _READS or (name in _TRANSFERS and ours and not is_ours):
        _count(is_read=True)
    elif name in _TRANSFERS and is_ours and on_host:
        _count(is_read=False)

    def unwrapped(value: Any) -> Any:
        return value.on_cpu if isinstance(value, DeviceTensor) else value

    def wrapped(value: Any) -> Any:
        if not is_ours or not isinstance(value, th.Tensor):
            return value
        if value.dtype == th.float64 and not _has_float64:
            raise TypeError(f"{name} returns a tensor of float64, which this device does not have")
        # What has been worked on in place is the tensor that it was
        return ours[id(value)] if id(value) in ours else DeviceTensor(value)

    kwargs = {key: _mapped(unwrapped, value) for key, value in kwargs.items()}
    if device is not None:
        kwargs["device"] = "cpu"
    return _mapped(wrapped, _KERNELS.get(name, function)(*_mapped(unwrapped, args), **kwargs))


_setup_privateuseone_for_python_backend(NAME)
_library = th.library.Library("_", "IMPL")
_library.fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")
