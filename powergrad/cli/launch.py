"""Becomes another program that dies when its parent does. Run by path, without site-packages, so that it costs milliseconds.

    python -I -S launch.py PARENT_PID PROGRAM ARGUMENT...

The kernel keeps the death signal across exec, and ties it to the THREAD that made the child: the parent starts its children from a
thread that lives as long as it does. Where there is no such signal (macOS), a killed parent's children have to be stopped by hand.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from powergrad.process import die_with_parent


def main() -> None:
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    os.execv(command[0], command)  # noqa: S606 - the whole purpose


if __name__ == "__main__":
    main()
