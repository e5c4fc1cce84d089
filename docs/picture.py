"""Makes training.svg, the picture in the README: a terminal while Tier 1 trains, from a real run.

python docs/picture.py      trains Tier 1 to its end, in an empty folder, and takes the picture on
                            the way, after the evaluation at half of it

What is drawn is what the training's own display draws; rich exports it.
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

from mlxgpt.training.forecast import Forecast
from rich.console import Console
from rich.terminal_theme import MONOKAI

from mlxgpt import api
from mlxgpt.cli.progress import TrainingDisplay
from mlxgpt.data.dataset import Dataset
from mlxgpt.storage.run import Run

PICTURE = Path(__file__).with_name("training.svg").absolute()
COMMAND = "mlxgpt train --tier 1"
EVALUATED, TAKEN = 2500, 2600  # steps


class Camera(TrainingDisplay):
    """The display of a training, and beside it a terminal that nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = Console(width=100, record=True, file=io.StringIO(), highlight=False)
        self.unseen.print(f"[dim]$[/dim] {COMMAND}")

    @contextmanager
    def unseen_too(self) -> Iterator[None]:
        """What is drawn here is drawn in the terminal that nobody sees."""
        seen, self.console = self.console, self.unseen
        try:
            yield
        finally:
            self.console = seen

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, forecast: Forecast) -> None:
        super().on_train_begin(run, dataset, start, forecast)
        with self.unseen_too():
            self.show_plan(run, dataset, forecast)
        self.unseen.print()

    def on_sample(self, step: int, text: str) -> None:
        super().on_sample(step, text)
        if step == EVALUATED:
            with self.unseen_too():
                super().on_sample(step, "\n".join(text.strip("\n").splitlines()[:7]))

    def on_log(self, record: dict[str, Any]) -> None:
        super().on_log(record)
        if record["step"] == TAKEN and self.view:
            self.unseen.print()
            self.unseen.print(self.view.drawn(record))
            svg = self.unseen.export_svg(title=COMMAND, theme=MONOKAI)
            # Rich's own export fetches its font when it is opened; any monospace font will do.
            PICTURE.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        api.train(tier=1, callbacks=[Camera()])


if __name__ == "__main__":
    main()
