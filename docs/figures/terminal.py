"""Make training.svg, the README's picture of a terminal while Tier 1 trains, from a real run.

    python docs/figures/terminal.py [TEXT]

Trains Tier 1 on Tiny Shakespeare, read from the file TEXT or downloaded, and exports the picture
with rich halfway. The run is written to the current folder, for screenshots.py.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from mlxgpt import api
from mlxgpt.cli.training_display import TrainingDisplay

SVG_PATH = Path(__file__).with_name("training.svg").absolute()
SHOWN_COMMAND = "mlxgpt train --tier 1"
SAMPLE_STEP, EXPORT_STEP = 2500, 2600


class RecordingDisplay(TrainingDisplay):
    """The display of a training run, which also draws on a recording console."""

    def __init__(self) -> None:
        super().__init__()
        self.recording_console = Console(
            width=100, record=True, file=io.StringIO(), highlight=False
        )
        self.recording_console.print(f"[dim]$[/dim] {SHOWN_COMMAND}")

    @contextmanager
    def use_recording_console(self) -> Iterator[None]:
        """Draw on the recording console instead of the terminal."""
        terminal, self.console = self.console, self.recording_console
        try:
            yield
        finally:
            self.console = terminal

    def on_sample(self, step: int, text: str) -> None:
        super().on_sample(step, text)
        if step == SAMPLE_STEP:
            with self.use_recording_console():
                super().on_sample(step, "\n".join(text.strip("\n").splitlines()[:7]))

    def on_log(self, record: dict[str, Any]) -> None:
        super().on_log(record)
        if record["step"] == EXPORT_STEP and self.view:
            self.recording_console.print()
            self.recording_console.print(self.view.render(record))
            svg = self.recording_console.export_svg(title=SHOWN_COMMAND, theme=MONOKAI)
            # Rich's own export fetches its font when it is opened; any monospace font will do.
            SVG_PATH.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def main(source: str | None = None) -> None:
    """Train Tier 1, and save the picture."""
    api.train(tier=1, source=source, callbacks=[RecordingDisplay()])


if __name__ == "__main__":
    main(*sys.argv[1:2])
