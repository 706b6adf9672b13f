"""Transfers from the host to the device of the policy."""

import torch as th


def sent_to(device: th.device, tensor: th.Tensor) -> th.Tensor:
    """
    Send a tensor from the host without waiting until it has arrived.

    To a GPU it goes from pinned memory: an ordinary transfer would first wait for all work queued on the GPU.
    On the CPU this returns ``tensor`` itself.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
