"""Hurt trainings in every way that we know, and count what they survive (``make stress``).

A run survives if it ends as it should, by itself, with one line and a status of its own, and goes on with --resume to
the same weights, moments, best score and records as a run that nothing happened to, to the last bit. It is lost if not,
and hung if it has not ended after two minutes.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from dimaskdino.config import Config
from dimaskdino.data.validation.start import check_datasets
from tests.stress.jobs import Ended, Job, outcome, progress, same, stress_cfg

KINDS = ("injected", "survived", "lost", "hung")
LONGEST_END_S = 60.0  # from the death of a process to the end of its job
MOST_KILLS = 5  # of one run


class LostError(Exception):
    """A run did not survive; says why."""


class HungError(Exception):
    """A run did not end."""


class Stress:
    """The scenarios, on a dataset and reference runs of their own.

    Args:
        folder: for everything.
        seed: of the choices; when a signal arrives also depends on the machine.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.shapes = folder / "shapes"
        check_datasets(self.cfg("made"))
        self._number = 0
        self._references: dict[int, tuple[dict[str, Any], float]] = {}

    def cfg(self, name: str, *options: Any) -> Config:
        """A run in a folder of that name."""
        return stress_cfg(self.shapes, self.folder / name, *options)

    def reference(self, processes: int) -> tuple[dict[str, Any], float]:
        """What a run to which nothing happens leaves, and its seconds."""
        if processes not in self._references:
            cfg = self.cfg(f"reference_{processes}")
            started = time.monotonic()
            ended = Job(cfg, processes=processes).start().end()
            if ended.status != 0:
                raise SystemExit(f"The reference run failed:\n{ended.errors[-2000:]}")
            self._references[processes] = outcome(cfg), time.monotonic() - started
        return self._references[processes]

    @contextlib.contextmanager
    def run(self, processes: int = 1) -> Iterator[Config]:
        """A folder for a run that will be hurt; afterwards it is resumed, and must end as the reference."""
        self.reference(processes)
        self._number += 1
        cfg = self.cfg(f"run_{self._number}")
        yield cfg
        ended = _checked(Job(cfg, resume=True, processes=processes).start().end())
        if ended.status != 0:
            raise LostError(f"--resume ended with status {ended.status}: {ended.errors[-500:]}")
        left, expected = outcome(cfg), self.reference(processes)[0]
        if differing := [part for part in expected if not same(left[part], expected[part])]:
            raise LostError(f"after --resume, {', '.join(differing)} differ from those of a run that was left alone")
        shutil.rmtree(cfg.OUTPUT_DIR)

    def kill(self, most: int = 2) -> int:
        """Kill -9 at a random time of what is left of a run, again and again until it ends, but not more than ``most``.

        Returns how often it was still running.
        """
        hits = 0
        with self.run() as cfg:
            for attempt in range(most):
                cfg.DATALOADER.NUM_WORKERS = self.random.choice((0, 0, 0, 1))
                job = Job(cfg, resume=attempt > 0).start()
                job.wait(self.random.uniform(0, self.reference(1)[1] * (1 - 0.9 * progress(cfg))))
                ended = _checked(job.end(lambda job=job: _kill(job.pid, signal.SIGKILL)))
                if ended.status == 0:
                    break
                hits += 1
                if ended.status != -signal.SIGKILL:
                    raise LostError(f"it ended with status {ended.status}: {ended.errors[-500:]}")
            cfg.DATALOADER.NUM_WORKERS = 0
        return hits

    def signal(self) -> None:
        """SIGTERM, SIGUSR1 or Ctrl-C while it trains."""
        number = self.random.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        with self.run() as cfg:
            job = Job(cfg).start()
            _wait_for(job)
            time.sleep(self.random.uniform(0, 0.8 * self.reference(1)[1]))
            ended = _checked(job.end(lambda: _kill(job.pid, number)))
            expected = 130 if number == signal.SIGINT else 75
            # A signal in the last moments comes after the run has put back the handlers.
            if ended.status not in (0, expected, -number, 1 if number == signal.SIGINT else 0):
                raise LostError(f"{number.name} ended it with status {ended.status}: {ended.errors[-500:]}")

    def damage(self) -> None:
        """Damage the last checkpoint, or what names it, of a run that was killed."""
        with self.run() as cfg:
            job = Job(cfg).start()
            folder = Path(cfg.OUTPUT_DIR)
            while len(list(folder.glob("model_0*.pth"))) < 2 and job.is_running():
                time.sleep(0.005)
            _checked(job.end(lambda: _kill(job.pid, signal.SIGKILL)))
            tag = folder / "last_checkpoint"
            last = folder / tag.read_text()
            content = last.read_bytes()
            place = self.random.randrange(len(content))
            damaged: list[Callable[[], object]] = [
                lambda: last.write_bytes(content[:place]),
                lambda: last.write_bytes(b""),
                lambda: last.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]),
                last.unlink,
                lambda: tag.write_text(""),
                lambda: tag.write_text("model_9999999.pth"),
                lambda: tag.write_text("../elsewhere.pth"),
                lambda: tag.write_bytes(b"\xff\xfe"),
            ]
            self.random.choice(damaged)()

    def full_disk(self) -> None:
        """No room for a file beyond a random size."""
        with self.run() as cfg:
            largest = max(path.stat().st_size for path in (self.folder / "reference_1").glob("*.pth"))
            limit = self.random.randrange(4000, largest)
            ended = _checked(Job(cfg, file_limit=limit).start().end())
            _check_one_line(ended, "No space is left", "free space")

    def dying_rank(self) -> None:
        """Kill -9 of one of two processes."""
        with self.run(processes=2) as cfg:
            job = Job(cfg, processes=2).start()
            _wait_for(job)
            time.sleep(self.random.uniform(0, 0.5 * self.reference(2)[1]))
            ranks = job.ranks()
            ended = _checked(job.end(lambda: ranks and _kill(self.random.choice(ranks), signal.SIGKILL)))
            if ended.status != 0 and not (ended.seconds < LONGEST_END_S and "error: " in ended.errors):
                raise LostError(f"the job ended after {ended.seconds:.0f} s: {ended.errors[-500:]}")

    def stopped_rank(self) -> None:
        """One of two processes stops answering."""
        with self.run(processes=2) as cfg:
            job = Job(cfg, processes=2).start()
            _wait_for(job)
            time.sleep(self.random.uniform(0, 0.3 * self.reference(2)[1]))
            ranks = job.ranks()
            rank = self.random.randrange(2)
            ended = _checked(job.end(lambda: len(ranks) == 2 and _kill(ranks[rank], signal.SIGSTOP)))
            if ended.status != 0 and f"waited for process {rank}" not in ended.errors:
                raise LostError(f"the error does not name process {rank}: {ended.errors[-500:]}")

    def bad_data(self) -> None:
        """An image or the annotation file is damaged or missing; the run refuses it, and trains once it is repaired."""
        with self.run() as cfg:
            (dataset,) = [path for path in self.shapes.iterdir() if path.is_dir()]
            images = sorted((dataset / "train").glob("*.png"))
            image, labels = self.random.choice(images), dataset / "annotations" / "instances_train.json"
            before = {path: path.read_bytes() for path in (image, labels)}
            text = before[labels].decode()
            damaged: list[Callable[[], object]] = [
                image.unlink,
                lambda: image.write_bytes(before[image][: self.random.randrange(100)]),
                lambda: labels.write_text(text[: self.random.randrange(len(text))]),
                lambda: labels.write_text(text.replace('"bbox":[', '"bbox":[NaN,', 1)),
                lambda: labels.write_text(text.replace('"category_id":', '"category_id":9', 1)),
                lambda: labels.write_text(text.replace('"image_id":', '"image_number":', 1)),
            ]
            try:
                self.random.choice(damaged)()
                ended = _checked(Job(cfg).start().end())
            finally:
                for path, content in before.items():
                    path.write_bytes(content)
            _check_one_line(ended, "")
            # An image without objects is not read, and one object less does not stop a run.
            shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)


def _checked(ended: Ended) -> Ended:
    if ended.status is None:
        raise HungError
    return ended


def _check_one_line(ended: Ended, *parts: str) -> None:
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    if ended.status not in (0, 2) or (ended.status == 2 and len(lines) != 1) or "Traceback" in ended.errors:
        raise LostError(f"status {ended.status}, not one line: {ended.errors[-500:]}")
    if ended.status == 2 and not any(part in lines[0] for part in parts):
        raise LostError(f"another error: {lines[0]}")


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_for(job: Job) -> None:
    while not job.is_training():
        time.sleep(0.005)


def main() -> None:
    """Run the scenarios, print the figures, and exit with status 1 if anything was lost or hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, help="kills with a resume after each (default: 100)")
    parser.add_argument("--others", type=int, help="runs of each other scenario (default: a fifth of the points)")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    others = max(1, args.points // 5) if args.others is None else args.others
    counts: dict[str, Counter[str]] = {}
    seconds: dict[str, float] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(Path(folder), args.seed)
        scenarios: list[tuple[Callable[..., int | None], int]] = [(stress.kill, args.points)]
        for scenario in (stress.signal, stress.damage, stress.full_disk, stress.bad_data):
            scenarios.append((scenario, others))
        scenarios += [(scenario, max(1, others // 2)) for scenario in (stress.dying_rank, stress.stopped_rank)]
        for scenario, number in scenarios:
            begun = time.monotonic()
            counts[scenario.__name__] = _count(scenario, number)
            seconds[scenario.__name__] = (time.monotonic() - begun) / max(1, counts[scenario.__name__]["injected"])
    total = sum(counts.values(), Counter())
    seconds["all"] = (time.monotonic() - started) / max(1, total["injected"])
    rows = [
        [name, *(count[kind] for kind in KINDS), seconds[name]] for name, count in (counts | {"all": total}).items()
    ]
    print(tabulate(rows, ["", *KINDS, "seconds each"], floatfmt=".1f"))
    print(f"{(time.monotonic() - started) / 60:.1f} min")
    sys.exit(1 if total["lost"] or total["hung"] else 0)


def _count(scenario: Callable[..., int | None], number: int) -> Counter[str]:
    """Run a scenario until ``number`` injuries are done; one that returns a number has done so many, any other one."""
    count: Counter[str] = Counter()
    while (left := number - count["injected"]) > 0:
        options = (min(left, MOST_KILLS),) if scenario.__name__ == "kill" else ()
        try:
            done = scenario(*options)
            done = 1 if done is None else done
            count["injected"] += done
            count["survived"] += done
            continue
        except HungError:
            count["hung"] += 1
            print(f"{scenario.__name__}: hung", flush=True)
        except LostError as reason:
            count["lost"] += 1
            print(f"{scenario.__name__}: lost: {reason}", flush=True)
        count["injected"] += 1
    return count


if __name__ == "__main__":
    main()
