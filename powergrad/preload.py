"""Imported by a template process: brings in what torch and its friends import only on first use, so that no fork has to.

Touches neither CUDA nor a parallel region: a fork of a process that has entered one hangs in its own.
"""

from __future__ import annotations

import sklearn.datasets  # noqa: F401
import torchvision.datasets  # type: ignore[import-untyped]  # noqa: F401

from powergrad.data.known import digit_arrays

digit_arrays()  # numpy only: no parallel region
