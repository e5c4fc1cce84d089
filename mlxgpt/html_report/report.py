"""The function behind `mlxgpt report`: writes a page, once or repeatedly."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.bench import side_by_side
from mlxgpt.config.resolve import PathLike, home
from mlxgpt.experiments import results
from mlxgpt.html_report import bench_page, compare_page, page, run_page
from mlxgpt.html_report.page import Page
from mlxgpt.storage import run as run_folders
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

JSON_FILE = "give a JSON file that `mlxgpt bench` or `mlxgpt compare` wrote."
LARGEST = 1 << 26  # bytes of a JSON file
EVERY = 10  # seconds, of a page that is written again and again


def report(
    *what: PathLike,
    output: PathLike | None = None,
    watch: bool = False,
    runs_dir: PathLike | None = None,
) -> Path:
    """Write a page on runs, on measurements, or on a comparison; its path.

    Args:
        what: runs' names or folders; or JSON files of `bench`, or one of `compare`. Default: the
            newest run.
        output: default: report.html in the run's folder, or here for several; a JSON file's name
            with .html.
        watch: write it again and again until these runs are finished.
    """
    named = [Path(one) for one in what]
    documents = [path for path in named if path.suffix == ".json"]
    if documents and (len(documents) < len(named) or watch):
        raise UserError(
            "a page is on runs, or on JSON files that hold still", "name one kind, without --watch."
        )
    if documents:
        path = Path(output) if output else documents[0].with_suffix(".html")
        page.write(path, _of_documents(documents).html())
        return path
    folders = _folders(named, home("runs", runs_dir))
    path = Path("report.html") if len(folders) > 1 else folders[0] / "report.html"
    path = Path(output) if output else path
    if watch:
        logger.info("%s is written again every %d seconds; Ctrl-C ends that", path, EVERY)
        with contextlib.suppress(KeyboardInterrupt):
            while not all(map(_is_finished, found := _opened(folders))):
                page.write(path, run_page.page_of(found).html(refresh=EVERY))
                time.sleep(EVERY)
    finished = run_page.page_of(_opened(folders))
    for line in finished.left_out:
        logger.warning(line)
    page.write(path, finished.html())
    return path


def _folders(named: Sequence[Path], runs_dir: Path) -> list[Path]:
    if named:
        return [run_folders.find(str(name), runs_dir).folder for name in named]
    if not (newest := run_folders.folders_in(runs_dir)):
        raise UserError(
            f"there is no run in {runs_dir.absolute()}", "train one: mlxgpt train --tier 1."
        )
    return newest[:1]


def _opened(folders: Sequence[Path]) -> list[Run]:
    return [run_folders.open_run(folder) for folder in folders]


def _is_finished(run: Run) -> bool:
    return not run.data_name or run.noted(run.config.train.max_steps)


def _of_documents(paths: Sequence[Path]) -> Page:
    try:
        text = files.read_small(paths[0], LARGEST)
    except OSError as error:
        raise files.os_error(error, "read", paths[0], JSON_FILE) from error
    except ValueError as error:
        raise UserError(f"cannot read {paths[0]}: {error}", JSON_FILE) from error
    if '"variants"' not in text or '"tiers"' in text:
        return bench_page.page_of(side_by_side.read(paths))
    if len(paths) > 1:
        raise UserError("several comparisons are named", "name one; each gets its own page.")
    return compare_page.page_of(results.from_json(text))
