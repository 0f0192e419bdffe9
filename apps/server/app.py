"""The application: routers over one service, behind one guard."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from edge_sd import __version__
from edge_sd.errors import EdgeSDError

from . import a1111, comparisons, health, openai, own, static
from .answers import on_error, refuse
from .guard import Guard, Rules
from .service import Service


def create_app(service: Service, rules: Rules | None = None) -> FastAPI:
    """An ASGI application over `service`, which stays the caller's to close."""
    app = FastAPI(
        title="edge-sd", version=__version__, docs_url=None, redoc_url=None,
        description="Stable Diffusion on this machine: the OpenAI Images API, AUTOMATIC1111's, and a queue of jobs.",
    )  # fmt: skip
    for kind in (EdgeSDError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    for each in (openai, a1111, own, health):
        app.include_router(each.router(service))
    app.include_router(comparisons.router(comparisons.Comparisons(service)))
    app.include_router(static.router())
    app.add_middleware(Guard, rules=rules or Rules(), refuse=refuse)
    return app
