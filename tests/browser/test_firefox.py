"""An HTML file that contains a model, in Firefox: its logits, sent to a server of the test."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.convert import html
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.storage import run as runs
from mlxgpt.storage.loading import load_model
from tests.browser.test_html_file import LOGITS
from tests.helpers.tiny_models import create_random_run
from tests.helpers.training_runs import MODERN_PARTS

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
pytestmark = pytest.mark.skipif(not FIREFOX, reason="Firefox is not installed")
IDS = list(range(30))
TIMEOUT_SECONDS = 120


class ResultServer:
    """Serves one page, and waits for the JSON that it sends back."""

    def __init__(self, page: str) -> None:
        self.results: list[Any] = []
        results = self.results

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(page.encode())

            def do_POST(self) -> None:
                results.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.server.timeout = TIMEOUT_SECONDS

    def wait_for_result(self) -> Any:
        """Handle requests until the page has sent its result."""
        for _ in range(20):
            self.server.handle_request()
            if self.results:
                return self.results[0]
        raise AssertionError("the page sent nothing")


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Any]:
    """Function that opens an address in Firefox, with a new profile."""
    processes: list[subprocess.Popen[bytes]] = []

    def open_address(address: str) -> None:
        command = [
            str(FIREFOX),
            "--headless",
            "--no-remote",
            "--profile",
            str(tmp_path / "profile"),
        ]
        (tmp_path / "profile").mkdir()
        processes.append(
            subprocess.Popen(
                [*command, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    yield open_address
    for process in processes:
        process.kill()
        process.wait()


def test_logits_in_firefox_are_those_of_mlx(tiny: Config, tmp_path: Path, firefox: Any) -> None:
    config = override_config(tiny, {"vocab_size": 257, "block_size": 64, **MODERN_PARTS})
    folder = create_random_run(tmp_path / "random", config, BPETokenizer([])).folder
    path = api.export_html(run=str(folder), output=tmp_path / "m.html").folder
    # The page itself may neither run other scripts nor send anything.
    page = re.sub(r"<meta http-equiv=[^>]*>", "", path.read_text(encoding="utf-8"))
    script = f"""<script>addEventListener("load", () => {{
        const started = setInterval(() => {{
            if (!document.body.dataset.ready) return;
            clearInterval(started);
            const result = {{ logits: ({LOGITS})({IDS}), text: document.title }};
            fetch("/", {{ method: "POST", body: JSON.stringify(result) }});
        }}, 50);
    }});</script>"""
    server = ResultServer(page.replace("</body>", f"{script}</body>"))
    thread = Thread(target=firefox, args=[f"http://127.0.0.1:{server.server.server_port}/"])
    thread.start()
    result = server.wait_for_result()
    thread.join()
    run = runs.open_run(folder)
    gpt, _ = load_model(run)
    load_parameters(gpt, html.pack_weights(flatten_params(gpt.parameters()), 8).rounded)
    expected = LoadedModel(run, gpt, 0).logits(np.array(IDS))[:, :257]
    np.testing.assert_allclose(result["logits"], expected, atol=1e-3)
    assert result["text"] == "random"
    server.server.server_close()
