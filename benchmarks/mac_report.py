"""What mlxgpt does on this machine, as one file to look at and to send: for whoever has a Mac,
where nobody has measured it yet.

    make mac-report [SOURCE=my.txt] [ARGS="--out DIR"]

In some twenty minutes: the machine, the self-check, the tests, the speed of both tiers beside what
was predicted, a minute of Tier 1, once untouched and once killed and resumed, and a text of it.
Where a part fails it is named, and the rest goes on. A sample of what was learned stands in the
report, so SOURCE should be nothing private. Exit code 1 if a part failed, 2 if it could not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import signal
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import mac_report_page as pages
from mac_report_lab import ROOT, Lab, Plan, apart, loss_of, ran, rates_of_fifths, steps_in
from mac_report_page import NAME, Part, Suite, Trained
from mac_report_power import power, printed

from mlxgpt import files
from mlxgpt.errors import UserError
from mlxgpt.machine import device, mac
from mlxgpt.reports import bench
from mlxgpt.reports.markdown import figure
from mlxgpt.reports.records import Machine
from mlxgpt.storage import notes

FIRST, UNTOUCHED, KILLED, TWIN = "first", "untouched", "killed", "twin"  # the trainings
INTERRUPTED = 130
GPU_SUMS = (
    "On a GPU sums may be added in another order each time: the resuming is to blame only where "
    "two untouched trainings end with the same bits."
)

Outcome = tuple[bool, str, Sequence[str]]  # whether it passed; what came of it, in one line; more


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Make a report; 0 if all passed, 1 if a part failed, 2 if it could not begin."""
    parser = argparse.ArgumentParser(prog=NAME, description="what mlxgpt does on this machine")
    parser.add_argument("--source", type=Path, metavar="FILE", help="a text to learn")
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "benchmarks/reports")
    given = parser.parse_args(arguments)
    # Also in the background, where it was ignored: the tests that try Ctrl-C would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        mac.refuse_others()
        must_be_writable(given.out)
        with mac.awake(), tempfile.TemporaryDirectory(prefix="mlxgpt-") as folder:
            home = Path(folder).resolve()
            lab = Lab(plan or Plan(), home, own_copy(given.source, home))
            path, parts = report(lab, given.out)
    except UserError as error:
        say(f"{NAME}: {error.problem}\n  → {error.remedy}")
        return 2
    except KeyboardInterrupt:
        say(f"{NAME}: stopped, and nothing written")
        return INTERRUPTED
    print(f"written to {path}")
    for word, passed in (("passed", True), ("failed", False)):
        print(f"{word}: {', '.join(p.name for p in parts if p.passed is passed) or 'nothing'}")
    return 0 if all(part.passed for part in parts) else 1


def must_be_writable(folder: Path) -> None:
    """Make a folder, before a long time goes into what is to lie there.

    Raises:
        UserError: if nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror}", "choose another folder: --out DIR"
        ) from error


def own_copy(source: Path | None, home: Path) -> Path | None:
    """A copy of a text, by a name that tells nothing.

    Raises:
        UserError: if it cannot be read.
    """
    if source is None:
        return None
    try:
        return Path(shutil.copyfile(source, home / f"text{source.suffix}"))
    except OSError as error:
        raise UserError(
            f"cannot read {source}: {error.strerror}", "give a file with text: --source FILE"
        ) from error


def report(lab: Lab, out: Path) -> tuple[Path, list[Part]]:
    """Do all of it, and write the page; where it is, and its parts."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    describe = cache(bench.describe_machine)
    tasks: dict[str, Callable[[], Outcome]] = {
        "the machine": partial(the_machine, describe),
        "the self-check": partial(self_check, lab),
        "the tests": partial(tests, lab),
        **{f"speed of {name}": partial(speed, lab, name) for name in lab.plan.configs},
        "a training": partial(training, lab),
        "killed and resumed": partial(killed_and_resumed, lab),
        "generation": partial(generation, lab),
    }
    parts = [attempt(name, task) for name, task in tasks.items()]
    machine: Machine | None = None
    with contextlib.suppress(Exception):  # its own part tells why
        machine = describe()
    title = machine.chip if machine else platform.machine()
    page = pages.private(pages.page(date, title, platform.system(), parts))
    path = unused(out, pages.stem(date, machine))
    files.write_atomically(path, page)
    return path, parts


def attempt(name: str, task: Callable[[], Outcome]) -> Part:
    """A part; whatever stops it is named in it, since a report with a gap is worth having."""
    say(f"{name} …")
    try:
        passed, line, body = task()
    except Exception as error:
        passed, line, body = False, last_line(error), ()
    part = Part(name, passed, line, body)
    say(f"  {pages.verdict(part)}: {line}")
    return part


def last_line(error: Exception) -> str:
    """What an error says last, but for what to do about it."""
    if isinstance(error, UserError):
        return error.problem
    last = (str(error).strip().splitlines() or [""])[-1]
    return last if type(error) is RuntimeError else f"{type(error).__name__}: {last}"


def unused(folder: Path, stem: str) -> Path:
    """A path that is not there yet."""
    path, number = folder / f"{stem}.md", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.md"
    return path


def the_machine(describe: Callable[[], Machine]) -> Outcome:
    """What it is, and what feeds it."""
    machine, now = describe(), power()
    model = printed("/usr/sbin/sysctl", "-n", "hw.model") if sys.platform == "darwin" else ""
    line = f"{machine.chip}, {machine.memory / 1e9:.1f} GB, MLX on {machine.backend}"
    if now.caution:
        line += f"; {now.caution}, and so perhaps slower than it could be"
    return True, line, pages.machine_lines(machine, model, now)


def self_check(lab: Lab) -> Outcome:
    """`mlxgpt check`."""
    checks = lab.mlxgpt("check")[0]
    failed = [check["name"] for check in checks if check["ok"] is False]
    line = ", ".join(failed) if failed else f"{len(checks)} checks"
    return not failed, line, pages.check_lines(checks)


def tests(lab: Lab) -> Outcome:
    """The checkout's tests."""
    results = lab.home / "tests.xml"
    command = [sys.executable, "-m", "pytest", *lab.plan.tests, f"--junitxml={results}"]
    ended = ran(command, lab.plan.limit)
    if not results.exists():
        raise RuntimeError(ended.last)
    found = read_tests(results, ended.seconds)
    line = f"{found.passed:,} passed, {found.failed:,} failed, {found.skipped:,} skipped"
    line += f", in {found.seconds:,.0f} s"
    return ended.code == 0, line, pages.failure_lines(found)


def read_tests(results: Path, seconds: float) -> Suite:
    """What pytest wrote as JUnit's XML, where the host's name stands, too."""
    cases = list(xml.parse(results).getroot().iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = {}
    for case in cases:
        for problem in (*case.iter("failure"), *case.iter("error")):
            reason = (problem.get("message") or "").strip().partition("\n")[0]
            failures[f"{case.get('classname')}::{case.get('name')}"] = reason[:200]
    names = {f"{case.get('classname')}::{case.get('name')}" for case in cases}
    passed = len(names) - skipped - len(failures)
    return Suite(passed, len(failures), skipped, list(failures.items()), seconds)


def speed(lab: Lab, name: str) -> Outcome:
    """How fast a tier is, beside what was predicted."""
    measured = bench.measure({name: lab.plan.configs[name]}, plan=lab.plan.bench)
    tier, chip = measured.tiers[0], pages.chip_of(measured.machine)
    trains, generates = tier.training.tokens_per_second, tier.generation.tokens_per_second.median
    line = f"{figure(trains)} tokens/s in training, {figure(generates)} in generation"
    return True, line, pages.speed_lines(tier, chip)


def training(lab: Lab) -> Outcome:
    """Train untouched; passed if it learned something."""
    plan = lab.plan
    begun = lab.mlxgpt(*lab.training_line(FIRST, plan.first_steps, None), "--log-interval", "1")[0]
    first = list(lab.run(FIRST).metrics())
    steps = steps_in(plan.seconds, first, lab.run(FIRST).config.tokens_per_step)
    before = power()
    ended, peak = lab.mlxgpt(*training_line(lab, UNTOUCHED, steps))
    after, run = power(), lab.run(UNTOUCHED)
    lines = list(run.metrics())
    rates = rates_of_fifths(lines, steps)
    found = Trained(
        text=name_of_text(lab, begun["warning"]),
        vocabulary=run.config.model.vocab_size,
        steps=steps,
        first_loss=loss_of(first[0]),
        last_loss=loss_of(lines[-1]),
        val_loss=ended["val_loss"],
        first_rate=rates[0],
        last_rate=rates[1],
        peak_memory=peak,
        before=before,
        after=after,
    )
    line = f"{steps:,} steps, loss {found.first_loss:.3f} to {found.last_loss:.3f}, "
    line += f"{figure(found.last_rate)} tokens/s in the end"
    return found.last_loss < found.first_loss, line, pages.trained_lines(found)


def name_of_text(lab: Lab, warning: str | None) -> str:
    """What was learned; a text of the user's own has no name here."""
    if lab.source:
        return "one given with SOURCE"
    return "the storybook, as Tiny Shakespeare could not be had" if warning else "Tiny Shakespeare"


def training_line(lab: Lab, name: str, steps: int) -> list[str]:
    """A training of the text as the first one left it, so that a network that comes and goes
    changes nothing.
    """
    return lab.training_line(name, steps, lab.run(FIRST).data_name)


def killed_and_resumed(lab: Lab) -> Outcome:
    """Kill a training in the middle, and give the same command again; passed if it ends as the one
    that nobody touched, or on a GPU, where two of these do not end the same.
    """
    untouched = lab.run(UNTOUCHED)
    steps = untouched.config.train.max_steps
    line = training_line(lab, KILLED, steps)
    died = lab.kill(KILLED, line, steps * 6 // 10)
    lab.mlxgpt(*line)
    resumed = lab.run(KILLED)
    history = (resumed.folder / notes.HISTORY).read_text(encoding="utf-8").splitlines()
    went_on = json.loads(history[-1])["step"]
    found = apart(untouched, resumed)
    body = [
        f"- Killed by SIGKILL after step {died:,}, it went on from step {went_on:,} to {steps:,}.",
        f"- Untouched, beside killed and resumed: {found}.",
    ]
    if went_on == 0:
        return False, "it began anew, and did not go on", body
    if found.same:
        return True, str(found), body
    lab.mlxgpt(*training_line(lab, TWIN, steps))
    twins, on_gpu = apart(untouched, lab.run(TWIN)), not device.on_cpu()
    body += [f"- Untouched, beside untouched: {twins}.", *([f"- {GPU_SUMS}"] if on_gpu else [])]
    return on_gpu and not twins.same, f"{found}; two untouched: {twins}", body


def generation(lab: Lab) -> Outcome:
    """Let the untouched training write; passed if the same seed makes the same text twice."""
    line = ["generate", "--run", UNTOUCHED, "--seed", "1"]
    line += ["--max-tokens", str(lab.plan.characters)]
    made = [lab.mlxgpt(*line)[0] for _ in range(2)]
    same = made[0]["texts"] == made[1]["texts"]
    rates = " and ".join(figure(one["tokens_per_second"]) for one in made)
    told = f"{rates} tokens/s, and the same text" if same else "one seed, and two texts"
    texts = [made[0]["texts"][0]] if same else [one["texts"][0] for one in made]
    body = ["Twice with the same seed, each time in a new process:"]
    for text in texts:
        body += ["", *pages.code(text)]
    return same, told, body


def say(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
