"""``python -m sb3_trpo_ext.zoo``, the command ``sb3-trpo`` for ``torchrun``."""

import sys

from sb3_trpo_ext.zoo.command import main

if __name__ == "__main__":
    sys.exit(main())
