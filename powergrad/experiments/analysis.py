"""What a worker's child does with an experiment's evidence: findings, and the files of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from powergrad.experiments.findings import Evidence


def analyse(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Findings and files of the evidence in `evidence`, a JSON file; the report goes into the folder `into`. Both are below `root`.

    Returns {findings, files: {name: {path, media_type, bytes, sha256}}}, paths below `root`. Raises OSError.
    """
    from powergrad.experiments import report, statistics  # scipy and matplotlib: half a second that no other child needs

    evidence: Evidence = json.loads((root / arguments["evidence"]).read_bytes())
    evidence["provenance"]["analysed_with"] = {name: version(name) for name in ("powergrad", "scipy", "numpy", "matplotlib")}
    findings = statistics.analyse(evidence)
    folder = root / arguments["into"]
    folder.mkdir(parents=True, exist_ok=True)
    written = report.write_all(findings, evidence, folder)
    return {"findings": findings, "files": {name: {**told, "path": f"{arguments['into']}/{name}"} for name, told in written.items()}}
