"""What a browser opens: the dashboard and the documentation, with nothing fetched from anywhere else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

DASHBOARD = Path(__file__).resolve().parent.parent / "dashboard"
"""What `python -m web.build` makes of web/."""
PAGES = ("/", "/jobs", "/jobs/{id}", "/experiments", "/experiments/{id}", "/compare", "/datasets", "/datasets/{name}", "/workers", "/new")
"""Places within the dashboard: a page that is opened there, or loaded anew, is the same document."""
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
# Swagger UI writes its own style elements and draws with data: images; nothing comes from another origin
DOCS_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}
FOR_EVER = "public, max-age=31536000, immutable"  # their names hold the hash of what is in them
WITHOUT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>PowerGrad</title>
<h1>PowerGrad</h1>
<p>The server runs; its dashboard has not been built, which takes npm's packages. Where they can be had:
<code>.venv/bin/python -m web.build</code>, then load this page anew.</p>
<p>All else is here: the <a href="/docs">documentation</a>, <a href="/openapi.json">/openapi.json</a> and the command line, <code>powergrad --help</code>.</p>
</html>
"""


class Assets(StaticFiles):
    """Files whose names change with their content."""

    def file_response(self, *args: object, **named: object) -> Response:
        response = super().file_response(*args, **named)  # type: ignore[arg-type]
        response.headers.update({**SAFE, "Cache-Control": FOR_EVER})
        return response


def install(app: FastAPI) -> None:
    """Put the dashboard, /docs and the files of both into the application, outside the contract."""
    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_files()), name="docs-assets")
    app.add_route("/docs", _docs, include_in_schema=False)
    app.mount("/assets", Assets(directory=DASHBOARD / "assets", check_dir=False), name="dashboard-assets")
    app.add_route("/icon.svg", _icon, include_in_schema=False)
    for path in PAGES:
        app.add_route(path, _dashboard, include_in_schema=False)


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
        swagger_favicon_url="/icon.svg",
    )
    page.headers["Content-Security-Policy"] = DOCS_POLICY
    return page


async def _dashboard(_: Request) -> Response:
    page = DASHBOARD / "index.html"
    headers = {**SAFE, "Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    if not page.is_file():
        return HTMLResponse(WITHOUT, headers=headers)
    return FileResponse(page, headers=headers, media_type="text/html")


async def _icon(_: Request) -> Response:
    icon = DASHBOARD / "icon.svg"
    if not icon.is_file():
        return Response(status_code=204)
    return FileResponse(icon, headers={**SAFE, "Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
