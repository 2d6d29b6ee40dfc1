"""The web application: routes, the page, errors in OpenAI's form."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..errors import UserError
from . import openai_routes, session_routes
from .service import Service
from .settings import ServeError
from .sse import Json, as_serve_error

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(service: Service) -> FastAPI:
    """Make the routes of a service, to be put behind a ``Guard``."""
    errors: Any = (ServeError, UserError, RequestValidationError, ValidationError, HTTPException, Exception)
    app = FastAPI(
        title="inplace-ttt", docs_url=None, redoc_url=None, openapi_url=None,
        exception_handlers=dict.fromkeys(errors, _refuse),
    )  # fmt: skip
    app.state.service = service
    app.include_router(openai_routes.router)
    app.include_router(session_routes.router)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"content-security-policy": POLICY})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.text(service.engine)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _refuse(request: Request, error: Exception) -> Json:
    known = as_serve_error(error)
    return Json(known.body(), known.status, known.headers)
