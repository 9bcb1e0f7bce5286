"""The serve command: a resolved configuration in, an HTTP server until a signal ends it.

FastAPI and its companions are an extra (`.[serve]`): they are imported only after the command has checked for them.
"""

from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from genai_pl.errors import ConfigError

NEEDS = ("fastapi", "uvicorn", "prometheus_client", "httpx")


def serve(config: DictConfig) -> int:
    """Serve the model that the configuration names; the exit status."""
    check_installed(config.cache)
    from genai_pl.serving.server import serve as run

    return run(read_settings(config))


def check_installed(cache: str | None) -> None:
    """ConfigError that lists the missing packages and how to install them. cache: the option, as Redis needs one
    more.
    """
    needs = [*NEEDS, "redis"] if cache not in (None, "memory") else NEEDS
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}: pip install -e '.[serve]'")


def read_settings(config: DictConfig):
    """The server's Settings from the configuration, with the fields of its Limits gathered; ConfigError for
    contradictions.
    """
    from genai_pl.serving.settings import Limits, Settings

    values = OmegaConf.to_container(config, resolve=True)
    limits = Limits(**{name: values.pop(name) for name in Limits.__dataclass_fields__})
    return Settings(adapters=name_adapters(values.pop("adapter")), limits=limits, **values)


def name_adapters(adapters: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """Adapter folders by name, the user's names or else the folder's; a folder called adapter or model is named by
    its run.

    >>> name_adapters(["runs/poems/adapter", "runs/code"])
    {'poems': 'runs/poems/adapter', 'code': 'runs/code'}
    """
    if isinstance(adapters, dict):
        wrong = next((name for name, path in adapters.items() if not isinstance(path, str)), None)
        if wrong is not None:
            raise ConfigError(f"adapter: {wrong} names no folder; write adapter={{{wrong}:FOLDER}}")
        return {str(name): path for name, path in adapters.items()}
    paths = [] if adapters is None else [adapters] if isinstance(adapters, str) else adapters
    by_name: dict[str, str] = {}
    for path in paths:
        folder = Path(path).resolve()
        name = folder.parent.name if folder.name in ("adapter", "model") else folder.name
        if name in by_name:
            raise ConfigError(
                f"adapter: two are called {name}; name them: adapter={{one:{by_name[name]},other:{path}}}"
            )
        by_name[name] = path
    return by_name
