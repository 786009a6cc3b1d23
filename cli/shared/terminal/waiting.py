"""How threads of PyTorch wait for one another: asleep, so that a busy machine is not kept busier.

By default the OpenMP library of PyTorch's builds lets a thread that waits spin for milliseconds (17 where a pause takes
140 cycles) before it sleeps. On a quiet machine that is free. Beside other work it spends the process's own share of
the cores on nothing, and it keeps from its core the very thread that is waited for: the scheduler gives a thread that
slept its turn at once, and one that spun goes to the end of the queue.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

__all__ = ["SPIN_CHOICES", "wait_asleep"]

SPIN_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's own decision


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the waiting policy of OpenMP to passive, unless the environment has chosen one.

    OpenMP reads it when it is loaded, so this must come before ``import torch``. No result depends on it.

    Args:
        environment: of the process.
    """
    if not any(name in environment for name in SPIN_CHOICES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
