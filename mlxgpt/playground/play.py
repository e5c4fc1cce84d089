"""`mlxgpt play`: find the run, start the server and open the web UI."""

from __future__ import annotations

import secrets
import webbrowser
from collections.abc import Callable

from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.html_report.language import check_language
from mlxgpt.storage import run as run_folders
from mlxgpt.utils.errors import UserError

DEFAULT_PORT = 8484
INSTALL_COMMAND = (
    "pip install 'starlette>=1,<2' 'uvicorn>=0.40,<1' 'h11>=0.16,<1' 'pydantic>=2.12,<3'"
)


def play(
    run: str | None = None,
    *,
    port: int = DEFAULT_PORT,
    browser: bool = True,
    lang: str | None = None,
    runs_dir: PathLike | None = None,
    ready: Callable[[str, str], None] = lambda address, key: None,
) -> None:
    """Serve the web UI and the OpenAI-compatible API of a run on localhost until Ctrl-C.

    Args:
        run: name or folder; default: the newest run, even if it has no checkpoint yet.
        port: port to listen on; 0: any free port.
        browser: whether to open the web UI in a browser.
        lang: language of the web UI, "en" or "pt"; default: the browser's.
        runs_dir: folder of the runs; default: `runs`.
        ready: called with the URL and the API key once the server is listening.

    Raises:
        UserError: if there is no run, a package is not installed, the port is taken, or `lang` is
            not a supported language.
    """
    if lang:
        check_language(lang)
    try:
        from mlxgpt.playground import server
    except ImportError as error:
        raise UserError(
            f"mlxgpt play needs {error.name}, which is not installed",
            f"install it: {INSTALL_COMMAND}.",
        ) from error
    runs_folder = resolve_folder("runs", runs_dir)
    run_paths = run_folders.list_run_folders(runs_folder)
    if run is None and run_paths:
        opened_run = run_folders.open_run(run_paths[0])
    else:
        opened_run = run_folders.find_run(run, runs_folder)
    listener = server.bind_socket(port)
    port = listener.getsockname()[1]
    key = secrets.token_urlsafe(24)
    address = f"http://{server.HOST}:{port}"

    def announce_ready() -> None:
        ready(address, key)
        if browser:
            webbrowser.open(f"{address}/#{key}")

    with listener:
        app = server.create_app(opened_run.folder.absolute(), port, key, lang)
        server.Server(app, announce_ready).run(sockets=[listener])
