"""What has to be set in a process for a run to give the same bits twice, and what is known to break it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import torch

_NO_DETERMINISTIC_FORM = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextmanager
def settings(*, deterministic: bool, threads: int) -> Iterator[None]:
    """Threads and determinism of this process for the time of a run; put back afterwards.

    threads: of every parallel region; sums are split among them, so they are part of the bits.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark_before = torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, so before the first CUDA call
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a write of every empty tensor; none is read
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark_before


@contextmanager
def watched(found: Callable[[str], None]) -> Iterator[None]:
    """Calls `found` once with the name of each op that has no deterministic form on its device. Other warnings go their usual way."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_NO_DETERMINISTIC_FORM.pattern)
        usual = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
        ) -> None:
            match = _NO_DETERMINISTIC_FORM.match(str(message))
            if match is None:
                usual(message, category, filename, lineno, file, line)
            elif match[1] not in seen:
                seen.add(match[1])
                found(match[1])

        warnings.showwarning = show
        yield
