from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from rich.live import Live
from rich.text import Text

from mlxgpt.cli import console
from mlxgpt.cli.console import PACKAGE_LOGGER, deduplicate_logs, logging_to_console, stderr_console
from mlxgpt.cli.progress import PreparationDisplay

Capture = pytest.CaptureFixture[str]
logger = logging.getLogger("mlxgpt.some.module")


def test_lines_are_printed_verbatim_and_only_on_stderr(capsys: Capture) -> None:
    line = "[bold]a path[/bold] :smile: " + "x" * 300
    with logging_to_console():
        logger.debug("unseen")
        logger.info(line)
        logger.warning("a warning of %s", "mine")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"{line}\na warning of mine\n", "not wrapped, no markup"


def test_import_installs_no_handlers_and_commands_remove_theirs(capsys: Capture) -> None:
    before = (list(PACKAGE_LOGGER.handlers), PACKAGE_LOGGER.level)
    with logging_to_console():
        assert len(PACKAGE_LOGGER.handlers) == len(before[0]) + 1
    assert (list(PACKAGE_LOGGER.handlers), PACKAGE_LOGGER.level) == before
    logger.info("unheard")
    assert capsys.readouterr().err == ""
    code = "import mlxgpt.api, logging; raise SystemExit(len(logging.getLogger('mlxgpt').handlers))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_ranks_print_only_errors(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, expected in (("0", "a note\na warning\nan error\n"), ("1", "an error\n")):
        monkeypatch.setenv("MLX_RANK", rank)
        with logging_to_console():
            logger.info("a note")
            logger.warning("a warning")
            logger.error("an error")
        assert capsys.readouterr().err == expected


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for variable in ("FORCE_COLOR", "NO_COLOR"):  # NO_COLOR wins
        monkeypatch.setenv(variable, "1")
        with logging_to_console():
            logger.warning("beware")
            logger.info("plain")
        warning, note = capsys.readouterr().err.splitlines()
        assert ("\x1b[1;33m" in warning) == (variable == "FORCE_COLOR")
        assert note == "plain"


def test_lines_appear_above_a_live_display(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """They use the display's console: the bar is erased and redrawn below."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with logging_to_console():
        shared = PreparationDisplay().console
        with Live(Text("the bar"), console=shared, auto_refresh=False) as live:
            live.refresh()
            capsys.readouterr()
            logger.info("a line")
    erased, line, drawn = capsys.readouterr().err.partition("a line\n")
    assert line
    assert "\x1b[2K" in erased
    assert "the bar" in drawn


def test_displays_share_a_console_only_while_logging_to_console() -> None:
    assert stderr_console() is not stderr_console()
    with logging_to_console():
        assert stderr_console() is stderr_console()


def test_repeated_line_is_printed_once_until_cleared(capsys: Capture) -> None:
    with logging_to_console():
        with deduplicate_logs() as printed:
            for _ in range(3):
                logger.info("the same")
            logger.info("another")
            printed.clear()
            logger.info("the same")
        logger.info("the same")
    assert capsys.readouterr().err.split("\n") == [
        "the same",
        "another",
        "the same",
        "the same",
        "",
    ]


def test_deduplicated_line_reaches_every_handler(capsys: Capture, notes: list[str]) -> None:
    with logging_to_console(), deduplicate_logs():
        logger.info("the same")
        logger.info("the same")
    assert notes == ["the same"]
    assert capsys.readouterr().err == "the same\n"


def test_nothing_heavy_is_imported_before_a_line_is_printed() -> None:
    code = f"import sys, {console.__name__} as c\nwith c.logging_to_console(): pass\n"
    code += "raise SystemExit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
