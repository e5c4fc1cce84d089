"""`mlxgpt report`: write an HTML report, once or repeatedly."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.bench import side_by_side
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.experiments import results
from mlxgpt.experiments.scaling_results import parse_scaling_record
from mlxgpt.html_report import bench_page, compare_page, page, run_page, scaling_page
from mlxgpt.html_report.language import use_language
from mlxgpt.html_report.page import Page
from mlxgpt.storage import run as run_folders
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 10  # seconds


def report(
    *targets: PathLike,
    output: PathLike | None = None,
    watch: bool = False,
    lang: str = "en",
    runs_dir: PathLike | None = None,
) -> Path:
    """Write an HTML report of runs, benchmarks, a comparison or a scaling study; return its path.

    Args:
        targets: names or folders of runs; or JSON files of `bench`, or one of `compare` or `scale`.
            Default: the newest run.
        output: path of the report. Default: report.html in the run's folder, or in the working
            directory for several runs; for JSON files, the first one's name with .html.
        watch: update the report every WATCH_INTERVAL seconds until the runs have finished.
        lang: language, "en" or "pt"; numbers and the texts of models stay.
        runs_dir: folder of the runs; default: `runs`.

    Raises:
        UserError: if a target cannot be read or the report cannot be written.
    """
    paths = [Path(target) for target in targets]
    json_paths = [path for path in paths if path.suffix == ".json"]
    if json_paths and (len(json_paths) < len(paths) or watch):
        raise UserError(
            "a report covers either runs or JSON files, and --watch works only with runs",
            "pass only runs, or only JSON files without --watch.",
        )
    with use_language(lang):
        if json_paths:
            path = Path(output) if output else json_paths[0].with_suffix(".html")
            page.write_page(path, _page_from_json(json_paths).to_html())
            return path
        folders = _find_run_folders(paths, resolve_folder("runs", runs_dir))
        path = Path("report.html") if len(folders) > 1 else folders[0] / "report.html"
        path = Path(output) if output else path
        _write_run_report(folders, path, watch=watch)
        return path


def _write_run_report(folders: Sequence[Path], path: Path, *, watch: bool) -> None:
    if watch:
        logger.info("updating %s every %d seconds; press Ctrl-C to stop", path, WATCH_INTERVAL)
        with contextlib.suppress(KeyboardInterrupt):
            while not all(map(_is_finished, open_runs := _open_runs(folders))):
                page.write_page(
                    path, run_page.build_runs_page(open_runs).to_html(refresh=WATCH_INTERVAL)
                )
                time.sleep(WATCH_INTERVAL)
    final_page = run_page.build_runs_page(_open_runs(folders))
    for line in final_page.warnings:
        logger.warning(line)
    page.write_page(path, final_page.to_html())


def _find_run_folders(paths: Sequence[Path], runs_dir: Path) -> list[Path]:
    if paths:
        return [run_folders.find_run(str(name), runs_dir).folder for name in paths]
    if not (newest_folders := run_folders.list_run_folders(runs_dir)):
        raise UserError(
            f"no runs found in {runs_dir.absolute()}", "train a model: mlxgpt train --tier 1."
        )
    return newest_folders[:1]


def _open_runs(folders: Sequence[Path]) -> list[Run]:
    return [run_folders.open_run(folder) for folder in folders]


def _is_finished(run: Run) -> bool:
    return not run.data_name or run.has_metrics(run.config.train.max_steps)


JSON_FILE_REMEDY = "pass a JSON file written by `mlxgpt bench`, `compare` or `scale`."
MAX_REPORT_JSON_BYTES = 1 << 26  # 64 MiB


def _page_from_json(paths: Sequence[Path]) -> Page:
    try:
        text = files.read_small(paths[0], MAX_REPORT_JSON_BYTES)
    except OSError as error:
        raise files.to_user_error(error, "read", paths[0], JSON_FILE_REMEDY) from error
    except ValueError as error:
        raise UserError(f"cannot read {paths[0]}: {error}", JSON_FILE_REMEDY) from error
    if '"fitted"' in text and '"test"' in text:
        _check_single(paths)
        return scaling_page.build_scaling_page(parse_scaling_record(text))
    if '"variants"' not in text or '"tiers"' in text:
        return bench_page.build_benchmark_page(side_by_side.read_measurements(paths))
    _check_single(paths)
    return compare_page.build_comparison_page(results.parse_comparison_record(text))


def _check_single(paths: Sequence[Path]) -> None:
    if len(paths) > 1:
        raise UserError("several comparisons were given", "pass one comparison per report.")
