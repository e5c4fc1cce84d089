"""Makes training.svg, the README's picture of a terminal while Tier 1 trains, from a real run.

    python docs/figures/terminal.py

Trains Tier 1 in an empty folder, with its own display, and exports the picture with rich halfway.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from mlxgpt import api
from mlxgpt.cli.progress import TrainingDisplay
from mlxgpt.data.dataset import Dataset
from mlxgpt.storage.run import Run
from mlxgpt.training.estimate import Estimate

SVG_PATH = Path(__file__).with_name("training.svg").absolute()
COMMAND = "mlxgpt train --tier 1"
SAMPLE_STEP, EXPORT_STEP = 2500, 2600


class RecordingDisplay(TrainingDisplay):
    """The display of a training run, which also draws on a recorded console."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = Console(width=100, record=True, file=io.StringIO(), highlight=False)
        self.recorded.print(f"[dim]$[/dim] {COMMAND}")

    @contextmanager
    def drawing_recorded(self) -> Iterator[None]:
        """Draw on the recorded console instead of the terminal."""
        terminal, self.console = self.console, self.recorded
        try:
            yield
        finally:
            self.console = terminal

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, estimate: Estimate) -> None:
        super().on_train_begin(run, dataset, start, estimate)
        with self.drawing_recorded():
            self.show_plan(run, dataset, estimate)
        self.recorded.print()

    def on_sample(self, step: int, text: str) -> None:
        super().on_sample(step, text)
        if step == SAMPLE_STEP:
            with self.drawing_recorded():
                super().on_sample(step, "\n".join(text.strip("\n").splitlines()[:7]))

    def on_log(self, record: dict[str, Any]) -> None:
        super().on_log(record)
        if record["step"] == EXPORT_STEP and self.view:
            self.recorded.print()
            self.recorded.print(self.view.render(record))
            svg = self.recorded.export_svg(title=COMMAND, theme=MONOKAI)
            # Rich's own export fetches its font when it is opened; any monospace font will do.
            SVG_PATH.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        api.train(tier=1, callbacks=[RecordingDisplay()])


if __name__ == "__main__":
    main()
