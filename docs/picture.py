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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from mlxgpt import api
from mlxgpt.display import TrainingDisplay

PICTURE = Path(__file__).with_name("training.svg").absolute()
COMMAND = "mlxgpt train --tier 1"
EVALUATED, TAKEN = 2500, 2600  # steps


class Camera(TrainingDisplay):
    """The display of a training, and beside it a terminal that nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.console
        self.unseen = Console(width=100, record=True, file=io.StringIO(), highlight=False)
        self.unseen.print(f"[dim]$[/dim] {COMMAND}")

    def start(self, *given: Any) -> None:
        """The plan, in the picture too."""
        self.console = self.unseen
        super().start(*given)
        self.console = self.seen
        self.unseen.print()

    def sample(self, step: int, text: str) -> None:
        """What it writes at half of the training, in the picture too."""
        super().sample(step, text)
        if step == EVALUATED:
            self.console = self.unseen
            super().sample(step, "\n".join(text.strip("\n").splitlines()[:7]))
            self.console = self.seen

    def log(self, record: dict[str, Any]) -> None:
        """The numbers; after some steps more the picture is taken."""
        super().log(record)
        if record["step"] == TAKEN:
            self.unseen.print()
            self.unseen.print(self._view())
            svg = self.unseen.export_svg(title=COMMAND, theme=MONOKAI)
            # Rich's own export fetches its font when it is opened; any monospace font will do.
            PICTURE.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        display = Camera()
        api.train(tier=1, display=display)


if __name__ == "__main__":
    main()
