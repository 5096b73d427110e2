"""Routes that take no parameter they do not know: a misspelt `dry_run` must not store a job, a misspelt filter not show everything."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.errors import Refused

SHOWN = 64
PREFIX = "x-prefix"
"""In a parameter's `openapi_extra`: it is a family, of which each begins so (`label.KEY`), and which the route's function reads itself."""


class StrictRoute(APIRoute):
    """Refuses, with 422, every query parameter that its function does not declare."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, known = super().get_route_handler(), query_names(self.dependant)
        prefixes = tuple(parameter[PREFIX] for parameter in (self.openapi_extra or {}).get("parameters", []) if PREFIX in parameter)

        async def handle_if_known(request: Request) -> Response:
            if request.scope["query_string"]:
                refuse_unknown(request, known, prefixes)
            return await handle(request)

        return handle_if_known


class DirectRoute(StrictRoute):
    """A route under load, whose scalar parameters are read here: FastAPI's resolution of two of them costs a third of a request.

    They are declared, documented, validated and refused as everywhere else. The function takes the request first, then the parameters.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        function, known = self.endpoint, query_names(self.dependant)
        fields = [(field, "header", field.alias) for field in self.dependant.header_params]
        fields += [(field, "query", field.alias) for field in self.dependant.query_params]
        defaults = {field.name: field.get_default() for field, _, _ in fields}

        async def handle(request: Request) -> Response:
            if request.scope["query_string"]:
                refuse_unknown(request, known)
            given: dict[str, Any] = {}
            wrong: list[dict[str, Any]] = []
            for field, where, alias in fields:
                source = request.headers if where == "header" else request.query_params
                if alias in source:
                    given[field.name], found = field.validate(source[alias], loc=(where, alias))
                    wrong += found
            if wrong:
                raise RequestValidationError(wrong)
            response: Response = await function(request, **defaults | given)
            return response

        return handle


def query_names(dependant: Dependant) -> frozenset[str]:
    """The query parameters that a route's function and its dependencies declare."""
    own = frozenset(parameter.alias for parameter in dependant.query_params)
    return own.union(*(query_names(inner) for inner in dependant.dependencies))


def refuse_unknown(request: Request, known: frozenset[str], prefixes: tuple[str, ...] = ()) -> None:
    """Raises Refused (422) that names every query parameter that is not `known` and begins with none of `prefixes`."""
    unknown = [name[:SHOWN] for name in request.query_params if name not in known and not name.startswith(prefixes)]
    if not unknown:
        return
    there = sorted(known) + [f"{prefix}KEY" for prefix in prefixes]
    rule = "no such parameter; " + (f"there is {', '.join(there)}" if there else "this call takes none")
    found = [{"parameter": name, "code": "unknown_parameter", "detail": rule} for name in unknown]
    raise Refused(errors.INVALID_REQUEST, f"{unknown[0]}: {rule}", errors=found)
