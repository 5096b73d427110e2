"""Who may import whom: the contracts hold, cover every module, and processes that must not load torch really do without it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import powergrad

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "scipy", "matplotlib", "optuna")
BLOCKING = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"{{name}} is imported")
sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def contracts() -> dict[str, dict[str, Any]]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {contract["name"].split()[0]: contract for contract in found}


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_library_is_on_one_side() -> None:
    """A new module must be named in a contract: with the training code, with the analysis, or with what does without either."""
    training = set(contracts()["Training"]["source_modules"]) | set(contracts()["Analysis"]["source_modules"])
    light = {name for name in contracts()["The"]["source_modules"] if name.startswith("powergrad.")}
    modules = {f"powergrad.{module.name}" for module in pkgutil.iter_modules(powergrad.__path__)}
    assert training & light == set()
    assert training | light == modules


def light_modules() -> list[str]:
    """Every module that a process without torch may load, found on disk."""
    names = []
    for top in contracts()["The"]["source_modules"]:
        path = ROOT / Path(*top.split("."))
        files = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.rglob("*.py"))
        names += [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [
        name.removesuffix(".__init__") for name in names if not name.endswith(("__main__", "migrations.env")) and ".versions." not in name
    ]


@pytest.mark.parametrize("package", ["api", "worker", "powergrad"])
def test_a_process_without_torch_can_load_them(package: str) -> None:
    names = [name for name in light_modules() if name.split(".")[0] == package]
    assert names
    done = subprocess.run([sys.executable, "-c", BLOCKING, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
