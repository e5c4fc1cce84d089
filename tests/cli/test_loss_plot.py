from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.cli import main as cli
from mlxgpt.cli.loss_plot import render_loss_chart
from tests.helpers.commands import Capture, expect_error

FALLING = [{"step": 10 * n, "loss": 4 - n / 20} for n in range(1, 41)]


def draw_lines(
    *records: dict[str, Any], width: int = 60, height: int = 12, **options: bool
) -> list[str]:
    return render_loss_chart(records, width, height, **options).plain.splitlines()


def test_falling_loss_is_drawn_falling_from_left_to_right() -> None:
    lines = draw_lines(*FALLING)
    assert len(lines) == 12
    assert max(map(len, lines)) <= 60
    assert lines[0].startswith("   3.")
    assert lines[-3].startswith("   2.0")
    rows_by_column = [
        next((n for n, c in enumerate(line[9:]) if c > "\u2800"), None) for line in lines[:-2]
    ]
    plotted_rows = [place for place in rows_by_column if place is not None]
    assert len(plotted_rows) > 8
    assert plotted_rows == sorted(plotted_rows)
    assert "0 to 400 steps" in lines[-1]


def test_validation_losses_are_drawn_as_rings() -> None:
    lines = draw_lines(
        *FALLING, {"step": 200, "val_loss": 3.0}, {"step": 400, "loss": 2.0, "val_loss": 2.5}
    )
    rings = [(n, line.index("○")) for n, line in enumerate(lines[:-1]) if "○" in line]
    assert len(rings) == 2
    assert rings[0][1] < rings[1][1]
    assert rings[0][0] < rings[1][0]


def test_without_unicode_the_chart_is_ascii() -> None:
    lines = draw_lines(*FALLING, {"step": 400, "val_loss": 2.5}, unicode=False)
    assert "\n".join(lines).isascii()
    assert "*" in "".join(lines)


VALUES = st.none() | st.floats() | st.integers() | st.text() | st.booleans()


@given(st.lists(st.tuples(st.integers(0, 10**15), VALUES, VALUES)), st.integers(1, 200))
def test_any_logged_values_can_be_drawn(records: list[tuple[int, Any, Any]], width: int) -> None:
    steps = sorted(records, key=lambda record: record[0])
    lines = draw_lines(*({"step": s, "loss": a, "val_loss": b} for s, a, b in steps), width=width)
    assert lines
    assert len(lines) in (1, 12)


def test_runs_plot_command(place: Path, capsys: Capture) -> None:
    assert cli.main(["runs", "--plot", "done"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("done\n")
    assert "0 to 12 steps" in output
    assert cli.main(["runs", "--plot", "runs/done", "--json"]) == 0
    assert '"val_loss"' in capsys.readouterr().out
    assert "there is no run named 'nobody'" in expect_error(capsys, "runs", "--plot", "nobody")
    Path("runs/done/metrics.jsonl").write_text("")
    assert cli.main(["runs", "--plot", "done"]) == 0
    assert "no loss has been logged yet" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [[2.0], [2.0, 2.0], [2.0] * 300, [1e5] + [1.0] * 200])
def test_short_and_flat_curves_and_a_high_first_loss(loss: list[float]) -> None:
    lines = draw_lines(*({"step": n + 1, "loss": value} for n, value in enumerate(loss)))
    assert len(lines) == 12
    assert "100000" not in "".join(lines) or len(loss) < 3
