"""From the host to where the policy is."""

import torch as th


def sent_to(device: th.device, tensor: th.Tensor) -> th.Tensor:
    """
    Send a tensor from the host without waiting until it has arrived.

    To a GPU it goes from pinned memory: an ordinary transfer would first wait for everything that the GPU has still to do.

    :param device: where to
    :param tensor: on the CPU
    :return: the tensor there; ``tensor`` itself if that is the CPU
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
