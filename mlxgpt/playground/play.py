"""Of `play`: from a run's name to a page that is open."""

from __future__ import annotations

import secrets
import webbrowser
from collections.abc import Callable

from mlxgpt.config.resolve import PathLike, home
from mlxgpt.storage import run as run_folders
from mlxgpt.utils.errors import UserError

PORT = 8484


def play(
    run: str | None = None,
    *,
    port: int = PORT,
    browser: bool = True,
    runs_dir: PathLike | None = None,
    ready: Callable[[str, str], None] = lambda address, key: None,
) -> None:
    """Open a page to see inside a run's model, on this machine alone; until Ctrl-C.

    Args:
        run: name or folder; default: the newest, also where it has no checkpoint yet.
        port: to listen on; 0: any that is free.
        browser: whether to open the page.
        ready: is called with the page's address and its key, once the server listens.

    Raises:
        UserError: if there is no run, what it takes is not installed, or the port is taken.
    """
    try:
        from mlxgpt.playground import server
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, and the page needs it",
            'install it: pip install "mlxgpt[play]"; in a checkout, pip install -e ".[play]".',
        ) from error
    runs = home("runs", runs_dir)
    newest = run_folders.folders_in(runs)
    if run is None and newest:
        found = run_folders.open_run(newest[0])
    else:
        found = run_folders.find(run, runs)
    listener = server.bound(port)
    port = listener.getsockname()[1]
    key = secrets.token_urlsafe(24)
    address = f"http://{server.HOST}:{port}"

    def begun() -> None:
        ready(address, key)
        if browser:
            webbrowser.open(f"{address}/#{key}")

    with listener:
        app = server.application(found.folder.absolute(), port, key)
        server.Server(app, begun).run(sockets=[listener])
