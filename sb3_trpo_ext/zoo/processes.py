"""Training in several processes with RL-Zoo: what ``torchrun -m sb3_trpo_ext.zoo train`` does.

The first process evaluates, writes files and prints; the others only train. After a failure ``torchrun --max-restarts`` starts
all of them again: the first one continues from the last checkpoint in the folder of its run, and the others get its state.
"""

import os
import socket
import sys
from pathlib import Path

import numpy as np

from sb3_trpo_ext.parallel.launch import broadcast, join_process_group
from sb3_trpo_ext.parallel.reductions import rank
from sb3_trpo_ext.zoo.options import Options
from sb3_trpo_ext.zoo.settings import KEY

#: In the folder of a run: which launch made it.
LAUNCH_FILE = ".launch"
#: Timesteps between checkpoints where restarts are allowed and the user says nothing.
SAVE_FREQ = 100_000


def join_processes(options: Options) -> None:
    """
    Find the other processes, and make the options agree: all get the same seed, and the first one alone prints and tracks.

    Checkpoints are asked for where restarts are allowed.

    :param options: of ``train``
    :raises ValueError: for what cannot be done in several processes
    """
    if options.algo not in (None, KEY):
        raise ValueError(
            f"`--algo`: {KEY} alone trains in several processes, got {options.algo!r}: start it without torchrun."
        )
    if options.optimize:
        raise ValueError("`-optimize`: a search runs in one process: start it without torchrun.")
    join_process_group()
    if options.save_freq is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        options.save_freq = SAVE_FREQ
    if options.seed is None or options.seed < 0:
        options.seed = broadcast(int(np.random.default_rng().integers(2**31)))
    if rank() > 0:
        options.track = None
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the process ends


def launch_name() -> str:
    """
    What all attempts of one launch have in common, and no other launch has.

    :return: the id that ``torchrun`` was given, or the machine and the process of ``torchrun`` itself
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def folder_of_launch(log_path: str, env_name: str) -> Path | None:
    """
    The folder that an earlier attempt of this launch made.

    :param log_path: the runs of an algorithm
    :param env_name: the environment, as it is in the name of a run
    """
    for file in Path(log_path).glob(f"{env_name}_*/{LAUNCH_FILE}"):
        if file.read_text(encoding="utf-8") == launch_name():
            return file.parent
    return None
