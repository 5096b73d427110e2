"""Imported by a template process: does what torch and its friends do only on first use, so that no fork has to.

Touches neither CUDA nor a parallel region: a fork of a process that has entered one hangs in its own.
"""

from __future__ import annotations

import sklearn.datasets  # noqa: F401
import torch.utils.serialization.config  # noqa: F401
import torchvision.datasets  # type: ignore[import-untyped]  # noqa: F401

from powergrad.data.known import digit_arrays
from powergrad.models import describe_models

digit_arrays()  # numpy only: no parallel region
# imports timm (0.9 s of 7, 28 MB, no thread), which the catalogue needs at every start: so no fork has to either; counts on the meta device, which
# computes nothing
describe_models()
