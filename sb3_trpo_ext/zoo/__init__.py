"""RL-Zoo with the TRPO of this package: the command ``sb3-trpo`` and the plugin for ``rl_zoo3``."""
