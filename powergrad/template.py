"""Imported once by the template process, from which trainers are forked in milliseconds.

Importing torch and torchvision costs seconds; forking a process that has them costs milliseconds. The template touches neither CUDA nor a
parallel region (both would break its children), and `PID` tells a child whether the parent it has is still the template.
"""

from __future__ import annotations

import importlib
import os
import signal

import setproctitle

from powergrad.process import die_with_parent

PID = os.getpid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the forks too: where all of a host are told to end, the worker is, and tells them
die_with_parent(os.getppid())  # before the slow imports; a parent that is gone already shows as the end of the forkserver's own pipe

for _name in importlib.import_module("powergrad.trainer").PRELOAD:
    importlib.import_module(_name)
setproctitle.setproctitle("powergrad: template")
