"""The web application: routes, the page, errors in OpenAI's form."""

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import UserError
from . import openai_routes, session_routes
from .guard import error_body, internal
from .service import Service
from .session_routes import mistakes
from .settings import ServeError
from .sse import as_serve_error

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(service: Service) -> FastAPI:
    """Make the routes of a service, to be put behind a ``Guard``."""
    app = FastAPI(title="inplace-ttt", docs_url=None, redoc_url=None, openapi_url=None)
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

    _errors(app)
    return app


def _errors(app: FastAPI) -> None:
    def answer(error: ServeError) -> JSONResponse:
        return JSONResponse(error_body(error), error.status, error.headers)

    @app.exception_handler(ServeError)
    async def served(request: Request, error: ServeError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(UserError)
    async def users(request: Request, error: UserError) -> JSONResponse:
        return answer(as_serve_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(ServeError(mistakes(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else None
        return answer(ServeError(str(error.detail), status=error.status_code, code=code))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return answer(internal())
