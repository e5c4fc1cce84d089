"""Of `bench`: what is measured, and beside whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgpt import config, config_files, files
from mlxgpt.reports import report
from mlxgpt.reports.records import Measurement
from mlxgpt.requests import PathLike

if TYPE_CHECKING:
    from mlxgpt.reports.distributed import Together

# As its README has it, "on a Macbook".
NANOGPT_ON_A_CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12}
GET_PEERS = "pip install 'torch>=2.6,<3' 'transformers>=5.7,<6' 'mlx-lm>=0.32,<0.33'"


PREDICTED_CHIP = "M4"  # of the smallest Mac that is bought by the dozen


def benchmark_together(
    *, note: Callable[[str], None] = lambda line: None
) -> tuple[Together | None, list[str]]:
    """Measure Tier 2's step by the ranks that mlx.launch started, or by two on this machine; and
    what 2 to 64 Macs are *predicted* to bring. The result, None but at the first rank, and lines
    on it.
    """
    from mlxgpt.distributed.launcher import launched
    from mlxgpt.reports import bench, chips, distributed, links

    config = bench.complete(config_files.tier(2))
    if launched():
        found = distributed.here(config, distributed.Plan())
    else:
        note("no mlx.launch: two ranks on this machine, each with half of its cores …")
        found = distributed.on_loopback(config, 2, distributed.Plan())
    if not found:
        return None, []
    here = next((one for one in chips.CHIPS if bench.device.name().endswith(f" {one.name}")), None)
    chip = here or next(one for one in chips.CHIPS if one.name == PREDICTED_CHIP)
    configs = {f"tier{n}": bench.complete(config_files.tier(n)) for n in (1, 2)}
    configs["gpt2-124m"] = config_files.load(config_files.built_in()["gpt2-124m"])
    return found, [*distributed.told(found), "", *links.markdown(chip, configs)]


def benchmark(
    *,
    tier: int | None = None,
    out: PathLike = "benchmarks/reports",
    peers: bool = False,
    peer_path: PathLike | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[Measurement, tuple[Path, Path]]:
    """Measure both tiers on this machine, and write a report: its JSON file and its Markdown file.

    Args:
        tier: measure only this one.
        out: the folder of reports.
        peers: measure PyTorch, transformers and mlx-lm at the same work, too: those that are here.
        peer_path: a checkout of nanoGPT to measure with them.
    """
    from mlxgpt.reports import bench  # not before it is asked for: whoever generates would wait
    from mlxgpt.rivals import contest

    checkout = Path(peer_path) if peer_path else None
    taking_part, missing = contest.contenders(checkout) if peers or checkout else ([], [])
    if missing:
        note(f"left out, as they are not installed: {', '.join(missing)}. For all: {GET_PEERS}")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.os_error(error, "write", folder, "choose another folder: --out DIR") from error
    tiers = {f"tier{n}": bench.complete(config_files.tier(n)) for n in (1, 2)}
    if tier:
        tiers = {f"tier{tier}": tiers[f"tier{tier}"]}
    measured = bench.measure(tiers, note=note)
    if taking_part:
        shape = config.override(config_files.tier(1), NANOGPT_ON_A_CPU)
        large = config_files.load(config_files.built_in()["gpt2-124m"])
        contests = contest.contests(
            tiers,
            taking_part,
            to_train={"nanoGPT's for a CPU": bench.complete(shape)},
            to_write={"gpt2-124m": bench.complete(large)},
            checkout=checkout,
            note=note,
        )
        measured = replace(measured, contests=tuple(contests))
    return measured, report.write(measured, folder)
