"""Data-parallel training: the same script in several processes, started by ``torchrun``.

Each process steps environments of its own. What an update needs of all of them is averaged in
:mod:`sb3_trpo_ext.parallel.reductions`. Here is the rest: how processes find each other, start from one state, count steps
together and notice if they diverge.
"""

import atexit
import datetime
import io
import os
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance, get_device

from sb3_trpo_ext.parallel.moments import Moments, all_joined, difference, joined, moments_of
from sb3_trpo_ext.parallel.reductions import all_max, all_sum, is_parallel, lost_connections_explained, rank, world_size

#: How long a process waits for the others: longer than any evaluation, which the first one makes alone.
TIMEOUT = datetime.timedelta(minutes=30)
#: What is added to the seed from one process to the next: more than a process has environments, which count up from its seed.
SEED_STRIDE = 100_003
#: What a launcher such as `torchrun` puts into the environment.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Attributes of a model that belong to its process.
_OWN = ("env", "n_envs", "device", "verbose", "seed", "tensorboard_log", "start_time")


def is_launched() -> bool:
    """Whether ``torchrun`` or another launcher has started this process as one of several."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def is_one_machine() -> bool:
    """Whether all processes of the launch are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE")) == os.environ.get("WORLD_SIZE")


def attempt() -> int:
    """How often ``torchrun`` has restarted these processes; 0 on several machines."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if is_one_machine() else 0


def join_process_group() -> None:
    """Find the other processes, if this one was launched with others: gloo on CPUs, NCCL on GPUs. Once is enough."""
    if not is_launched() or not dist.is_available() or dist.is_initialized():
        return
    # Some builds of PyTorch have no distributed package
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # Gloo beside NCCL: what is on the host goes over the network without a detour through the GPU
    backend = "cpu:gloo,cuda:nccl" if th.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store, number, n_processes = next(rendezvous("env://", timeout=TIMEOUT))
    # The store outlives the processes, and after a restart holds the addresses of those that are gone
    dist.init_process_group(
        backend, store=PrefixStore(f"attempt_{attempt()}", store), rank=number, world_size=n_processes, timeout=TIMEOUT
    )
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    """End communication while the interpreter is still there."""
    if dist.is_initialized():
        # A thread of gloo may be about to free the last tensor, for which it needs the interpreter. Were that gone, the
        # process would die with "terminate called without an active exception" (PyTorch's issue 190489)
        time.sleep(0.2)
        dist.destroy_process_group()


def rank_device(device: th.device | str) -> th.device | str:
    """
    The GPU of this process, where several share a machine.

    :param device: what the user asked for
    :return: the same; for CUDA without a number, the GPU with this process's number on its machine
    :raises ValueError: if there are more processes than GPUs
    """
    if not is_launched():
        return device
    chosen = get_device(device)
    if chosen.type != "cuda":
        return device
    index: int | None = chosen.index
    if index is None:
        local_rank, n_devices = int(os.environ.get("LOCAL_RANK", 0)), th.cuda.device_count()
        if local_rank >= n_devices:
            problem = f"there is no GPU for process {local_rank} of this machine, which has {n_devices}"
            raise ValueError(f"`device` is {device!r}, but {problem}: start fewer processes on it, or pass `device='cpu'`.")
        chosen = th.device("cuda", local_rank)
    th.cuda.set_device(chosen)
    return chosen


def rank_seed(seed: int | None) -> int | None:
    """The seed of this process: different ones explore differently."""
    return None if seed is None else (seed + SEED_STRIDE * rank()) % 2**32


def start_together(model: OnPolicyAlgorithm, arguments: tuple[int, int, bool]) -> tuple[int, int, bool]:
    """
    Check that all processes can train together, and give them the state of the first one.

    That is policy, optimizers, counters, VecNormalize statistics and how long to train: a checkpoint that the first process
    has loaded is enough for all.

    :param model: before ``learn``
    :param arguments: ``total_timesteps``, ``log_interval`` and ``reset_num_timesteps`` of ``learn``
    :return: those of the first process
    :raises ValueError: if the processes' settings, networks or kinds of device differ
    """
    _check_settings(model)
    statistics = running_statistics(model)
    counters = {name: value for name, value in vars(model).items() if type(value) in (int, float) and name not in _OWN}
    file = io.BytesIO()
    if rank() == 0:
        # As a file, so that each process can load it onto its own device
        th.save(model.get_parameters(), file)
    content, counters, first_statistics, arguments = broadcast(
        (file.getvalue(), counters, {name: vars(stats) for name, stats in statistics.items()}, arguments)
    )
    if rank() > 0:
        model.set_parameters(th.load(io.BytesIO(content), map_location="cpu", weights_only=True), device=model.device)
        vars(model).update(counters)
        for name, stats in statistics.items():
            vars(stats).update(first_statistics[name])
        # The first process alone writes
        model.set_logger(Logger(None, []))
    return arguments


def _check_settings(model: OnPolicyAlgorithm) -> None:
    """Compare what must be the same on all processes; raises a ``ValueError`` that names what differs, with its values."""
    settings: dict[str, Any] = {
        name: value
        for name, value in vars(model).items()
        if type(value) in (int, float, str, bool) and not name.startswith("_") and name not in (*_OWN, "num_timesteps")
    }
    settings["device"] = model.device.type
    settings["policy"] = {name: tuple(tensor.shape) for name, tensor in model.policy.state_dict().items()}
    settings["frozen parameters"] = [name for name, param in model.policy.named_parameters() if not param.requires_grad]
    settings["VecNormalize"] = sorted(running_statistics(model))
    settings["world_size"] = world_size()
    everyone = gathered(settings)
    for name in sorted({name for others in everyone for name in others}):
        values = [others.get(name) for others in everyone]
        if any(value != values[0] for value in values):
            shown = values if name != "policy" else "networks of different shapes"
            problem = f"`{name}` must be the same on all processes, got {shown} (the first one first)"
            raise ValueError(f"{problem}: run the same script with the same arguments everywhere.")


def gathered(value: Any) -> list[Any]:
    """The objects of all processes, the first one first."""
    everyone: list[Any] = [None] * world_size()
    with lost_connections_explained():
        dist.all_gather_object(everyone, value)
    return everyone


def broadcast(value: Any) -> Any:
    """Send an object from the first process to all others."""
    if not is_parallel():
        return value
    payload = [value]
    with lost_connections_explained():
        dist.broadcast_object_list(payload, src=0)
    return payload[0]


def running_statistics(model: BaseAlgorithm) -> dict[str, RunningMeanStd]:
    """The running statistics of a model's VecNormalize, by name."""
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is None:
        return {}
    observations = getattr(vec_normalize, "obs_rms", {})
    if not isinstance(observations, dict):
        observations = {"": observations}
    named = {f"VecNormalize.obs_rms{f'[{key!r}]' if key else ''}": stats for key, stats in observations.items()}
    return named | {"VecNormalize.ret_rms": vec_normalize.ret_rms}


def _moments(stats: RunningMeanStd) -> Moments:
    """SB3's running statistics as moments."""
    count, mean, var = (th.tensor(np.asarray(value), dtype=th.float64) for value in (stats.count, stats.mean, stats.var))
    return Moments(count, mean, var * count)


class SharedStatistics:
    """Running statistics that each process updates alone; merging makes them those of all samples."""

    def __init__(self, statistics: dict[str, RunningMeanStd]):
        self._statistics = statistics
        self._merged = {name: _moments(stats) for name, stats in statistics.items()}

    def merge_(self) -> None:
        """Join what all processes have seen since the last merge to what was merged then."""
        for name, stats in self._statistics.items():
            before = self._merged[name]
            new = all_joined(difference(_moments(stats), before))
            if new.n > 0:
                self._merged[name] = total = joined(before, new)
                stats.count, stats.mean, stats.var = float(total.n), total.mean.numpy(), total.variance.numpy()


def check_identical(model: OnPolicyAlgorithm) -> None:
    """
    End the run if the processes have diverged: one exchange of two numbers per tensor.

    :param model: after an update
    :raises RuntimeError: with the names of what differs
    """
    if not is_parallel():
        return
    tensors: dict[str, th.Tensor] = dict(model.policy.state_dict())
    for name, stats in running_statistics(model).items():
        tensors |= {f"{name}.mean": th.as_tensor(stats.mean), f"{name}.var": th.as_tensor(stats.var)}
    tensors["num_timesteps"] = th.tensor(model.num_timesteps)
    hashes = th.stack([_hash(tensor).to(model.device) for tensor in tensors.values()])
    # The largest hash and, with the sign turned, the smallest
    largest, smallest = all_max(th.stack([hashes, -hashes])).tolist()
    names = [name for name, high, low in zip(tensors, largest, smallest, strict=True) if high != -low]
    if names:
        differing = f"they differ in {', '.join(names)}"
        raise RuntimeError(
            f"The processes of this run have come apart by update {model._n_updates}: {differing}. Either something, such as "
            "a callback, has changed the model in one process alone, or the machines do not round alike (other CPUs, numbers "
            "of threads or builds of PyTorch). The last checkpoint can be loaded."
        )


def _hash(tensor: th.Tensor) -> th.Tensor:
    """A number that tells the bits of one tensor from those of another, computed where the tensor is."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(th.int32) if flat.element_size() % 4 == 0 else flat.to(th.int32)
    # With weights, since differences of opposite signs would cancel in a plain sum
    weights = th.arange(1, len(bits) + 1, device=bits.device) * 0x9E3779B1
    return (bits * weights).sum() & (2**62 - 1)


def joint_explained_variance(values: th.Tensor, returns: th.Tensor) -> float:
    """
    How much of the returns' variance the values explain, over all processes.

    :param values: of this process, shape ``(n_samples,)``
    :param returns: the same shape
    :return: 1 at best; NaN if all returns are the same
    """
    values, returns = th.stack([values, returns]).cpu()
    if not is_parallel():
        return float(explained_variance(values.numpy(), returns.numpy()))
    total = all_joined(moments_of(th.stack([returns - values, returns], dim=1)))
    residual, variance = total.variance.tolist()
    return float("nan") if variance == 0 else 1 - residual / variance


class RankCallback(CallbackList):
    """
    Holds the processes together during a training: what they count, what they normalize with, when they stop.

    The user's callbacks run in the first process, after this one has counted the steps of all. If one of them ends the
    training, all processes end it after the rollout they are in. The others wait at the end of a rollout while the first
    one evaluates.

    :param statistics: what the processes normalize with, the same on all of them now
    :param callback: the user's
    :param progress_bar: whether to display one
    """

    def __init__(self, statistics: dict[str, RunningMeanStd], callback: MaybeCallback, progress_bar: bool = False):
        given = callback if isinstance(callback, list) else [] if callback is None else [callback]
        callbacks = [part if isinstance(part, BaseCallback) else ConvertCallback(part) for part in given]
        bars = [ProgressBarCallback()] if progress_bar else []
        super().__init__([*callbacks, *bars] if rank() == 0 else [])
        # Now and not when training starts: the first observations come in between
        self._statistics = SharedStatistics(statistics)
        #: Whether all processes have agreed to end the training.
        self.is_over = False
        #: Episodes and successes of this rollout, for the first process.
        self._finished: dict[str, list[Any]] = defaultdict(list)

    def _init_callback(self) -> None:
        assert isinstance(self.model, OnPolicyAlgorithm)
        self._n_other_envs = int(all_sum(th.tensor(self.model.n_envs))) - self.model.n_envs
        super()._init_callback()
        self._bars = [part for part in self.callbacks if isinstance(part, ProgressBarCallback)]

    def _on_step(self) -> bool:
        self.model.num_timesteps += self._n_other_envs
        self.num_timesteps = self.model.num_timesteps
        if rank() > 0:
            # A rollout on the device has none, and reports its episodes at its end
            infos = self.locals.get("infos", ())
            for info, is_done in zip(infos, self.locals["dones"], strict=bool(infos)):
                if "episode" in info:
                    self._finished["ep_info_buffer"].append(info["episode"])
                if is_done and info.get("is_success") is not None:
                    self._finished["ep_success_buffer"].append(info["is_success"])
        elif not self.is_over:
            self.is_over = not super()._on_step()
            for bar in self._bars:
                # It has counted the steps of this process
                bar.pbar.update(self._n_other_envs)
        # No process stops alone: the others would wait forever
        return True

    def _on_rollout_end(self) -> None:
        self.is_over = bool(all_max(th.tensor(int(self.is_over))))
        self._statistics.merge_()
        if rank() > 0:
            self._finished["ep_info_buffer"] += self.locals.get("finished_episodes", [])
        everyone = gathered(dict(self._finished))
        self._finished.clear()
        for finished in everyone if rank() == 0 else ():
            for name, entries in finished.items():
                getattr(self.model, name).extend(entries)
        super()._on_rollout_end()
