"""What a child process does so that it never outlives its parent. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DEADLINE_PASSED = 70
"""Exit status of a process whose right to run was not renewed."""
ORPHANED = 71
"""Exit status of a process that found its parent gone."""


def die_with_parent(expected_ppid: int) -> None:
    """Have the kernel kill this process when its parent ends; exit at once if it has ended already.

    To be called first thing in the child. The signal follows the THREAD that created the child: a child made by a thread that ends is
    killed with it. Elsewhere than on Linux it checks the parent once; there, watch a pipe for its end.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != expected_ppid:
        os._exit(ORPHANED)
