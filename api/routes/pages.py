"""What a browser opens: the front page and the documentation, with nothing fetched from anywhere else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

# Swagger UI writes its own style elements and draws with data: images; nothing comes from another origin
CONTENT_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
FRONT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>PowerGrad</title>
<h1>PowerGrad</h1>
<p>A REST service that trains image classifiers. Start with the <a href="/docs">documentation</a>;
the machine-readable contract is <a href="/openapi.json">/openapi.json</a>.</p>
</html>
"""


def install(app: FastAPI) -> None:
    """Put /, /docs and the files of Swagger UI into the application, outside the contract."""
    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_files()), name="docs-assets")
    app.add_route("/docs", _docs, include_in_schema=False)
    app.add_route("/", _front, include_in_schema=False)


def swagger_ui_files() -> Path:
    """The folder with Swagger UI's script and style, as the fastapi-offline wheel ships them; the package itself is not imported."""
    found = find_spec("fastapi_offline")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("fastapi-offline is missing: pip install 'powergrad[server]'")
    return Path(found.origin).with_name("static")


async def _docs(_: Request) -> Response:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="PowerGrad API",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    page.headers["Content-Security-Policy"] = CONTENT_POLICY
    return page


async def _front(_: Request) -> Response:
    return HTMLResponse(FRONT, headers={"Content-Security-Policy": CONTENT_POLICY})
