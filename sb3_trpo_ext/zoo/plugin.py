"""
Plugin for the stock ``rl_zoo3`` command: importing it puts the TRPO of this package under RL-Zoo's key ``trpo``.

    rl_zoo3 train --algo trpo --gym-packages sb3_trpo_ext.zoo.plugin -conf sb3_trpo_ext.zoo.plugin --env Humanoid-v5
    rl_zoo3 enjoy --algo trpo --gym-packages sb3_trpo_ext.zoo.plugin --env Humanoid-v5 -f logs

RL-Zoo checks ``--algo`` before it imports the ``--gym-packages``, hence the existing key; and ``-conf`` takes a module with a
dictionary ``hyperparams``.
"""

from sb3_trpo_ext.zoo.command import load_hyperparams, register

register("trpo")

hyperparams = load_hyperparams()
