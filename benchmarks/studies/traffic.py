"""What the processes of a data-parallel training send in one update, and when that takes longer than the update itself.

    python -m benchmarks.studies.traffic

The first half is arithmetic on the shapes of a network, which a test compares with what two processes really send. The second
half is a model on paper: it knows the latency and the bandwidth of a network, the rate at which a process computes, and the
usual cost of an all-reduce, and says where communication overtakes computation.
"""

import itertools
import json
import math
from typing import Any, NamedTuple

#: Bytes of a float32.
FLOAT = 4


class Network(NamedTuple):
    """Shapes of actor and critic, and how they are trained."""

    #: Weights and biases of the actor, with its log std.
    n_actor: int
    n_critic: int
    #: Entries in ``policy.state_dict()``: SB3 has a features extractor of the actor in it twice.
    n_tensors: int
    #: Multiply-adds of one sample through actor and critic, forwards.
    actor_operations: int
    critic_operations: int
    #: Inputs and outputs of each linear layer of an MLP actor; empty for an actor without preconditioner.
    layers: tuple[tuple[int, int], ...] = ()
    #: Length of the log std.
    n_log_std: int = 0
    #: Numbers in the observation that VecNormalize has statistics of; 0 without VecNormalize.
    n_normalized: int = 0


class Update(NamedTuple):
    """What an update did."""

    cg_steps: int
    n_trials: int
    n_critic_steps: int
    is_preconditioned: bool


class Message(NamedTuple):
    """Reductions of one kind."""

    what: str
    calls: int
    #: Of one call, as the process hands them over.
    n_bytes: int


def messages(network: Network, update: Update) -> list[Message]:
    """
    All reductions of one rollout and its update, without the episodes that are reported to the first process.

    :param network: shapes
    :param update: what it did
    :return: in the order in which they come
    """
    found = [Message("whether to stop", 1, 8)]
    if network.n_normalized:
        # Count and mean, then squared deviations, in double precision; of the observations and of the returns
        for size in (network.n_normalized, 1):
            found += [Message("VecNormalize", 1, 8 * (size + 1)), Message("VecNormalize", 1, 8 * size)]
    found += [Message("number of samples", 1, 8)]
    found += [Message("advantages", 1, 16), Message("advantages", 1, 8), Message("advantages", 1, FLOAT)]
    found += [Message("objective and gradient", 1, FLOAT * (network.n_actor + 1))]
    if network.layers:
        found += [Message("cost of the preconditioner", 1, FLOAT)]
    found += [Message("Fisher-vector products", update.cg_steps, FLOAT * network.n_actor)]
    if update.is_preconditioned:
        factors = sum((n_in + 1) ** 2 + n_out**2 for n_in, n_out in network.layers)
        found += [Message("Kronecker factors", 1, FLOAT * (factors + network.n_log_std))]
    found += [Message("trials of the line search", update.n_trials, 2 * FLOAT), Message("entropy and std", 1, 16)]
    found += [Message("critic's gradients", update.n_critic_steps, FLOAT * network.n_critic)]
    found += [Message("critic's loss", 1, FLOAT)]
    found += [Message("finite values", 2, 8), Message("explained variance", 1, 24), Message("explained variance", 1, 16)]
    # Number of timesteps, and of each statistic mean and variance
    n_hashes = network.n_tensors + 1 + (4 if network.n_normalized else 0)
    return [*found, Message("hashes", 1, 16 * n_hashes)]


def mlp(n_in: int, hidden: tuple[int, ...], n_out: int) -> tuple[tuple[int, int], ...]:
    """
    Inputs and outputs of each layer.

    :param n_in: of the network
    :param hidden: sizes of the hidden layers
    :param n_out: of the network
    :return: one pair per layer
    """
    sizes = (n_in, *hidden, n_out)
    return tuple(itertools.pairwise(sizes))


def humanoid() -> Network:
    """Humanoid-v5 with our settings: 348 observations, two hidden layers of 256 each for actor and critic, 17 actions."""
    actor, critic = mlp(348, (256, 256), 17), mlp(348, (256, 256), 1)
    operations = [sum(a * b for a, b in layers) for layers in (actor, critic)]
    n_actor, n_critic = (sum((a + 1) * b for a, b in layers) for layers in (actor, critic))
    return Network(n_actor + 17, n_critic, 13, *operations, layers=actor, n_log_std=17, n_normalized=348)


def nature_cnn() -> Network:
    """Atari with ``CnnPolicy``: 4 x 84 x 84 images, the network of the Nature paper twice, 6 actions."""
    # (kernel, channels in, channels out, side of the output)
    convolutions = ((8, 4, 32, 20), (4, 32, 64, 9), (3, 64, 64, 7))
    n_params = sum(k * k * c_in * c_out + c_out for k, c_in, c_out, _ in convolutions) + 3136 * 512 + 512
    operations = sum(k * k * c_in * c_out * side**2 for k, c_in, c_out, side in convolutions) + 3136 * 512
    return Network(n_params + 513 * 6, n_params + 513, 28, operations + 512 * 6, operations + 512)


class Machine(NamedTuple):
    """What the model on paper assumes of a cluster."""

    name: str
    #: Seconds from one process to the next.
    latency: float
    #: Bytes per second out of a process.
    bandwidth: float
    #: Multiply-adds per second of a process during updates.
    rate: float
    #: Environment steps per second of a process during rollouts.
    steps_per_second: float
    #: Gloo's all-reduce is a ring, whose latency grows with the number of processes; NCCL chooses.
    has_rings_only: bool


def reduce_seconds(machine: Machine, n_processes: int, n_bytes: float) -> float:
    """
    Time of one all-reduce: a ring with gloo, else the cheapest known (Thakur, Rabenseifner & Gropp 2005, section 4.5).

    :param machine: latency and bandwidth
    :param n_processes: how many take part
    :param n_bytes: of the tensor
    :return: seconds
    """
    if n_processes == 1:
        return 0.0
    rounds = math.ceil(math.log2(n_processes))
    share = (n_processes - 1) / n_processes
    ring = 2 * (n_processes - 1) * machine.latency + 2 * share * n_bytes / machine.bandwidth
    if machine.has_rings_only:
        return ring
    doubling = rounds * (machine.latency + n_bytes / machine.bandwidth)
    halving = 2 * rounds * machine.latency + 2 * share * n_bytes / machine.bandwidth
    return min(doubling, ring, halving)


def times(
    machine: Machine, network: Network, update: Update, n_processes: int, n_samples: int, n_epochs: int
) -> dict[str, float]:
    """
    Seconds of one rollout and its update.

    :param machine: a process and the network between them
    :param network: shapes
    :param update: what an update does
    :param n_processes: how many
    :param n_samples: of each process
    :param n_epochs: of the critic
    :return: rollout, computation and communication
    """
    # A gradient is a forward and a backward pass, three times the operations of the first; a Fisher-vector product is a
    # tangent and a cotangent pass, four times; a trial is a forward pass
    passes = 3 + 4 * update.cg_steps + update.n_trials
    operations = n_samples * (passes * network.actor_operations + 3 * n_epochs * network.critic_operations)
    sent = messages(network, update)
    return {
        "rollout": n_samples / machine.steps_per_second,
        "computation": operations / machine.rate,
        "communication": sum(m.calls * reduce_seconds(machine, n_processes, m.n_bytes) for m in sent),
    }


#: One core per process: rate, steps per second and latency as measured on two cores (47 G multiply-adds per second in matrix
#: products; 0.4 ms for an all-reduce of two numbers by two processes), the bandwidth that of 10 Gbit Ethernet. One GPU per
#: process: all assumed.
CORES = Machine("one core per process, gloo, 10 Gbit Ethernet", 200e-6, 1.25e9, 47e9, 2600, True)
GPUS = Machine("one GPU per process, NCCL, 200 Gbit InfiniBand", 10e-6, 25e9, 5e12, 5000, False)
PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


def case(name: str, machine: Machine, network: Network, n_samples: int, batch_size: int, n_epochs: int) -> dict[str, Any]:
    """
    The model from one to a thousand processes.

    :param name: of the case
    :param machine: assumed
    :param network: shapes
    :param n_samples: of each process
    :param batch_size: of each process
    :param n_epochs: of the critic
    :return: assumptions and times, and from how many processes on communication takes longer
    """
    n_critic_steps = n_epochs * math.ceil(n_samples / batch_size)
    update = Update(4 if network.layers else 10, 2, n_critic_steps, bool(network.layers))
    sent = messages(network, update)
    table = {n: times(machine, network, update, n, n_samples, n_epochs) for n in PROCESSES}
    efficiency = {
        n: (t["rollout"] + t["computation"]) / (t["rollout"] + t["computation"] + t["communication"]) for n, t in table.items()
    }

    def first(limit: str) -> int | None:
        """From how many processes on communication takes longer than the rest, or than the computation alone."""
        bound = {n: t["computation"] + (t["rollout"] if limit == "all" else 0.0) for n, t in table.items()}
        return next((n for n, t in table.items() if t["communication"] > bound[n]), None)

    return {
        "case": name,
        "machine": machine._asdict(),
        "n_samples": n_samples,
        "batch_size": batch_size,
        "n_epochs": n_epochs,
        "update": update._asdict(),
        "calls": sum(m.calls for m in sent),
        "megabytes": round(sum(m.calls * m.n_bytes for m in sent) / 1e6, 2),
        "megabytes_of_critic": round(sum(m.calls * m.n_bytes for m in sent if m.what == "critic's gradients") / 1e6, 2),
        "seconds": {str(n): {key: round(value, 4) for key, value in t.items()} for n, t in table.items()},
        "efficiency": {str(n): round(value, 3) for n, value in efficiency.items()},
        "communication_exceeds_computation_from": first("computation"),
        "communication_exceeds_all_from": first("all"),
    }


def cases() -> list[dict[str, Any]]:
    """The table of the page on scaling."""
    found = []
    for machine in (CORES, GPUS):
        for batch_size in (256, 4096):
            found.append(case(f"humanoid, batch_size {batch_size}", machine, humanoid(), 4096, batch_size, 10))
        for batch_size in (128, 1024):
            found.append(case(f"nature_cnn, batch_size {batch_size}", machine, nature_cnn(), 1024, batch_size, 10))
    return found


def main() -> None:
    """Print the model."""
    print(json.dumps(cases(), indent=1))


if __name__ == "__main__":
    main()
