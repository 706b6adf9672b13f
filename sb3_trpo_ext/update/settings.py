"""Settings of the whole process that an update changes while it lasts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Shared:
    """
    A setting that is changed while any thread needs it, and restored when none does.

    If each thread restored what it had found, two threads that overlap would leave the setting changed.

    :param make_context: changes the setting on entry and restores it on exit
    """

    def __init__(self, make_context: Callable[[], AbstractContextManager[Any]]):
        self._make_context = make_context
        self._lock = threading.Lock()
        self._n_inside = 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._stack.enter_context(self._make_context())
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._stack.close()


@contextmanager
def _checks_off() -> Iterator[None]:
    """Switch off the argument checks of ``torch.distributions``."""
    before = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(before)


#: Within it ``torch.distributions`` does not check its arguments: a trial step of a line search may give a NaN or a std of
#: zero, which must become a non-finite KL that rejects the trial, and not an exception. The checks also make the host wait.
no_argument_checks = _Shared(_checks_off)
#: Within it ``scaled_dot_product_attention`` uses the only kernel that can be differentiated twice, as products with the
#: Fisher matrix are (PyTorch's issue 116350).
twice_differentiable_attention = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))
#: Within it recurrent networks on a GPU run on PyTorch's own kernels, which can be differentiated twice.
no_cudnn = _Shared(lambda: th.backends.cudnn.flags(enabled=False))
#: Multiplications in one pass through a network up to which it runs on one thread, for about 0.2 ms at most.
MAX_SIZE_FOR_ONE_THREAD = 2**22
#: With PyTorch's other backend the number of threads cannot be changed once they run.
CAN_SET_THREADS = "ATen parallel backend: OpenMP" in th.__config__.parallel_info()


def threads_for(n_multiplications: float, device: th.device) -> AbstractContextManager[None]:
    """
    A context for small products: one thread of PyTorch on the CPU, at the cost of a microsecond.

    The results are the same to the last bit. Small products are hardly faster on two threads, but OpenMP's threads spin after
    them, on the cores that other processes need.

    :param n_multiplications: in one pass through the network
    :param device: where it is
    :return: a context that leaves the number of threads alone for larger products
    """
    is_small = CAN_SET_THREADS and device.type == "cpu" and n_multiplications <= MAX_SIZE_FOR_ONE_THREAD
    return one_thread() if is_small else nullcontext()


@contextmanager
def one_thread() -> Iterator[None]:
    """
    Let PyTorch compute with one thread for a while.

    The number of threads belongs to the whole process, so only the main thread changes it: two trainings that overlap would
    each restore what the other one has set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(before)
