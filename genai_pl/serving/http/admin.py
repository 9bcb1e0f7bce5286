"""Admin routes: adapters that are loaded, replaced and deleted while the server runs; they have keys of their own."""

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from genai_pl.serving.errors import documented
from genai_pl.serving.service import Service

ERRORS = documented(401, 403, 404, 408, 409, 413, 422, 429, 500)


class AdapterBody(BaseModel):
    """An adapter to serve.

    name: for the field `model` of requests
    path: its folder, or a run with one, below adapters_root, to which it may be relative
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    path: str = Field(min_length=1, max_length=4096)


class AdapterEntry(BaseModel):
    """A served adapter.

    path: its folder. created: Unix time in seconds when it was loaded
    """

    name: str
    path: str
    created: int


class AdapterList(BaseModel):
    """The served adapters, and the folder below which more may be loaded."""

    adapters: list[AdapterEntry]
    root: str


class Change(BaseModel):
    """What a request has changed.

    done: loaded, replaced or deleted. Requests that had begun keep the adapter that they began with.
    """

    name: str
    done: str


def admin_routes(service: Service) -> APIRouter:
    """GET and POST /admin/adapters, DELETE /admin/adapters/NAME, for one model; Guard asks for the key."""
    router = APIRouter(prefix="/admin", responses=ERRORS, tags=["admin"])

    @router.get("/adapters")
    async def adapters() -> AdapterList:
        """The served adapters."""
        found = service.adapters.by_name.values()
        entries = [AdapterEntry(name=each.name, path=str(each.folder), created=each.since) for each in found]
        return AdapterList(adapters=entries, root=str(service.adapters.root))

    @router.post("/adapters")
    async def load(body: AdapterBody) -> Change:
        """Load an adapter, or replace the one of this name."""
        replaced = await service.adapters.load(body.name, body.path)
        return Change(name=body.name, done="replaced" if replaced else "loaded")

    @router.delete("/adapters/{name:path}")
    async def delete(name: str) -> Change:
        """Serve an adapter no more."""
        await service.adapters.delete(name)
        return Change(name=name, done="deleted")

    return router
