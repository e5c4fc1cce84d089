"""Ranks on this machine, each behind a link of a limited rate, as machines are: what steps and sums
take, the model fitted on some of it, and held against the rest.

    sudo python benchmarks/links.py [--json FILE]

Linux, as root: each rank runs in a network namespace of its own, its link limited by `tc tbf`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from mlxgpt import config_files
from mlxgpt.config import Config, from_tree, override
from mlxgpt.reports import bench, links
from mlxgpt.reports.distributed import CHILD, Plan, Together, environment, together_from
from mlxgpt.reports.links import Link

RATES = {"100 Mb": 1e8, "300 Mb": 3e8, "1 Gb": 1e9, "2.5 Gb": 2.5e9, "10 Gb": 1e10}
# With more ranks than cores only links that are slow beside these.
SUMS = {2: tuple(RATES), 3: ("100 Mb", "300 Mb", "1 Gb"), 4: ("100 Mb", "300 Mb", "1 Gb")}
STEPS = ((2, "300 Mb"), (2, "1 Gb"), (2, "10 Gb"))
# Fitted on the sums of these, and held against all others, and the steps.
FITTED_ON = ((2, "300 Mb"), (2, "1 Gb"), (2, "10 Gb"), (4, "300 Mb"))
# Up to 32 MiB: a larger result is given back to the kernel and made anew each time, by glibc alone.
NUMBERS = (1_000_000, 4_000_000, 8_000_000)
TINY = from_tree(
    {
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 16},
        "train": {"batch_size": 12, "dtype": "float32"},
    }
)
STEP = bench.complete(config_files.tier(2))
PORT = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("links.json"))
    given = parser.parse_args()
    if os.geteuid():
        sys.exit("namespaces and tc need root")
    seen: list[tuple[int, str, Together]] = []

    def note(size: int, name: str, config: Config, plan: Plan) -> None:
        found = measured(config, size, RATES[name], plan)
        print(size, name, told(found), flush=True)
        seen.append((size, name, found))
        trees = [[size, name, asdict(one)] for size, name, one in seen]
        given.json.write_text(json.dumps(trees))

    for size, names in SUMS.items():
        for name in names:
            note(size, name, TINY, Plan(repeats=1, seconds=0.01, numbers=NUMBERS))
    for size, name in STEPS:
        note(size, name, STEP, Plan(repeats=5, seconds=1.0))
    print("\n".join(fitted(seen)))


def told(found: Together) -> str:
    if found.ms_sums:
        return ", ".join(f"{n:,}: {one.least:,.1f} ms" for n, one in found.ms_sums.items())
    ms = (found.ms_alone, found.ms_share, found.ms_step, found.ms_halved)
    return ", ".join(f"{one.median:,.0f} ms ({one.least:,.0f} to {one.most:,.0f})" for one in ms)


def fitted(observed: list[tuple[int, str, Together]]) -> list[str]:
    """The model, and its error where it was fitted and where not."""
    sums = [
        (size, name, numbers, spread.least / 1000)
        for size, name, found in observed
        for numbers, spread in found.ms_sums.items()
    ]
    cores = os.cpu_count() or 1
    fitted_on = [
        (size, 4 * numbers, RATES[name], seconds)
        for size, name, numbers, seconds in sums
        if (size, name) in FITTED_ON
    ]
    costs = links.fit(fitted_on, cores)
    lines = [
        f"{costs}",
        "",
        "| ranks | link | numbers | measured | model | error | |",
        "|" + "---|" * 7,
    ]
    errors: dict[bool, list[float]] = {True: [], False: []}
    for size, name, numbers, seconds in sums:
        link = Link(name, RATES[name], costs.crowded if size > cores else 0.0)
        model = links.sum_seconds(size, 4 * numbers, link, costs)
        error = model / seconds - 1
        fit = (size, name) in FITTED_ON
        errors[fit].append(abs(error))
        lines.append(
            f"| {size} | {name} | {numbers:,} | {1000 * seconds:,.0f} ms | "
            f"{1000 * model:,.0f} ms | {error:+.0%} | {'fitted' if fit else 'tested'} |"
        )
    for fit, all_of_them in errors.items():
        mean, most = sum(all_of_them) / len(all_of_them), max(all_of_them)
        lines.append(
            f"\n{'fitted' if fit else 'tested'}: error {mean:.1%} on average, {most:.1%} at most"
        )
    lines += [
        "",
        "| ranks | link | gradients in | alone | share | step | model | error |",
        "|" + "---|" * 8,
    ]
    for size, name, found in observed:
        if found.ms_sums:
            continue
        link = Link(name, RATES[name], 0.0)
        share = found.ms_share.median
        for dtype, step in (("float32", found.ms_step), ("bfloat16", found.ms_halved)):
            config = override(STEP, {"reduce_dtype": dtype})
            model = share + 1000 * links.averaging_seconds(size, config, link, costs)
            lines.append(
                f"| {size} | {name} | {dtype} | {found.ms_alone.median:,.0f} ms | "
                f"{share:,.0f} ms | {step.median:,.0f} ms | {model:,.0f} ms | "
                f"{model / step.median - 1:+.0%} |"
            )
    return lines


def measured(config: Config, size: int, rate: float, plan: Plan) -> Together:
    """Measure with so many ranks behind links of a rate."""
    request = json.dumps({"config": asdict(config), "plan": asdict(plan)})
    cores = os.cpu_count() or 1
    with TemporaryDirectory() as scratch, network(size, rate):
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps([[f"10.77.0.{n + 1}:{PORT}"] for n in range(size)]))
        children = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"mlxgpt{n}", *CHILD, request, str(n % cores)],
                env={**os.environ, **environment(n, hosts, 1)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for n in range(size)
        ]
        ended = [child.communicate() for child in children]
    if any(child.returncode for child in children):
        sys.exit("\n".join(error for _, error in ended))
    return together_from(json.loads(ended[0][0]))


@contextmanager
def network(size: int, rate: float) -> Iterator[None]:
    """So many namespaces at one bridge, what each sends limited to a rate."""

    def run(*command: str) -> None:
        subprocess.run(command, check=True)

    names = [f"mlxgpt{n}" for n in range(size)]
    burst = max(32_000, int(rate / 8 / 1000))  # of a millisecond: more would pass too fast
    try:
        run("ip", "link", "add", "mlxgptbr", "type", "bridge")
        run("ip", "link", "set", "mlxgptbr", "up")
        for n, name in enumerate(names):
            inside = f"eth{n}in"
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", inside)
            run("ip", "link", "set", f"{name}v", "master", "mlxgptbr", "up")
            run("ip", "link", "set", inside, "netns", name)
            within = ("ip", "netns", "exec", name)
            run(*within, "ip", "addr", "add", f"10.77.0.{n + 1}/24", "dev", inside)
            run(*within, "ip", "link", "set", inside, "up")
            run(*within, "ip", "link", "set", "lo", "up")
            limit = ("rate", f"{rate:.0f}bit", "burst", f"{burst}", "latency", "100ms")
            run(*within, "tc", "qdisc", "add", "dev", inside, "root", "tbf", *limit)
        yield
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), check=False)
            subprocess.run(("ip", "link", "del", f"{name}v"), check=False, capture_output=True)
        subprocess.run(("ip", "link", "del", "mlxgptbr"), check=False)


if __name__ == "__main__":
    main()
