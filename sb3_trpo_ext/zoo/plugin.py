"""
Plugin for the stock ``rl_zoo3`` command: importing it puts the TRPO of this package under RL-Zoo's key ``trpo``.

    rl_zoo3 train --algo trpo --gym-packages sb3_trpo_ext.zoo.plugin -conf sb3_trpo_ext.zoo.plugin --env Humanoid-v5
    rl_zoo3 enjoy --algo trpo --gym-packages sb3_trpo_ext.zoo.plugin --env Humanoid-v5 -f logs

RL-Zoo checks ``--algo`` before it imports the ``--gym-packages``, hence the existing key; and ``-conf`` takes a module with a
dictionary ``hyperparams``.
"""

import sys

from sb3_trpo_ext.zoo.manager import Manager, register
from sb3_trpo_ext.zoo.settings import load_hyperparams

register("trpo")
# `python -m rl_zoo3.train` runs a second copy of that module
if getattr(sys.modules["__main__"].__spec__, "name", None) == "rl_zoo3.train":
    vars(sys.modules["__main__"])["ExperimentManager"] = Manager

hyperparams = load_hyperparams()
