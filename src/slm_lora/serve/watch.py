"""The read-only page of `slm-lora watch`: experiments of a folder, updated by polling.

Names and texts come from disk. The script inserts them as text only, and the
Content-Security-Policy allows no other script; reports are shown in a frame without scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from slm_lora.serve import experiments

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
_ASSETS = {"watch.js": "text/javascript", "watch.css": "text/css"}


def make_watch_app(root: Path) -> Starlette:
    """The application: GET and HEAD only.

    Args:
        root: folder of the experiments' folders; read at each request.
    """

    def folder_of(request: Request) -> tuple[str, Path]:
        name = request.path_params["name"]
        folder = experiments.folders(root).get(name)
        if folder is None:
            raise HTTPException(404, "no such experiment")
        return name, folder

    def page(request: Request) -> Response:
        return _asset("watch.html", "text/html")

    def experiment_page(request: Request) -> Response:
        folder_of(request)
        return page(request)

    def all_experiments(request: Request) -> Response:
        return JSONResponse({"experiments": experiments.summaries(root)}, headers=_HEADERS)

    def one_experiment(request: Request) -> Response:
        return JSONResponse(experiments.details(*folder_of(request)), headers=_HEADERS)

    def report(request: Request) -> Response:
        path = experiments.report_file(folder_of(request)[1])
        if path is None:
            raise HTTPException(404, "no report yet")
        headers = {**_HEADERS, "Content-Security-Policy": REPORT_POLICY}
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)

    def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise HTTPException(404, "no such file")
        return _asset(name, _ASSETS[name])

    routes: dict[str, Callable[[Request], Response]] = {
        "/": page,
        "/experiment/{name}": experiment_page,
        "/experiment/{name}/report": report,
        "/api/experiments": all_experiments,
        "/api/experiments/{name}": one_experiment,
        "/static/{name}": asset,
    }
    return Starlette(
        routes=[Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()]
    )


def _asset(name: str, media_type: str) -> Response:
    content = files("slm_lora.serve").joinpath(name).read_bytes()
    headers = {**_HEADERS, "Content-Security-Policy": PAGE_POLICY}
    return Response(content, media_type=media_type, headers=headers)
