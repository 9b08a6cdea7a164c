"""Statistics of runs by turns: how often each runs, until which its times are steady, what is kept.

A turn is every run once, mostly ours and one rival, so that a slow moment of the machine hits both
alike, and each finds the caches as the other one leaves them. Turns before
the first that counts warm what a run needs (first touches, thread pools, caches), until no run is
faster than it was: a row is the same whatever has run before it in its process. A sample is a run's
median over as many turns as take 60 ms: one where they take longer. A run that takes less than a
twentieth of a turn is done up to nine times in it, of which the median counts: one call behind a
rival of a second tells how that left the caches. What counts of two runs is the ratio of their
samples, turn for turn, and its median: a machine that is slow for some turns is so for both. It is
steady where its quartiles, or of a run by itself those of its times, are at most 5 % of the median
apart; else all is measured again, at most four times, and the steadiest attempt is kept, whomever
it favours. From the second attempt on each run is done once before it counts: behind another one it
gets memory that this has given back, which a virtual machine's host may have taken meanwhile (some
milliseconds for 2 MiB); in a training a step is behind its like.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

STEADY, FAILED = 0.05, 0.10  # interquartile range over median: measured again, a failure
ATTEMPTS, FEWEST = 4, 5  # attempts; samples of one
SECONDS = 0.4  # of one attempt where the fewest samples allow it
_PATIENCE = 3.0  # times the seconds of an attempt: for more no other one begins
_SAMPLE = 0.06
_OF_A_TURN, _REPEATED = 0.05, 9
_AS_FAST = 0.95


class Times(NamedTuple):
    """Seconds of every run's samples."""

    samples: dict[str, list[float]]
    attempts: int

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        low, _, high = _quartiles(self.samples[name])
        return low, high

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """Quartiles of `name`'s time / that of `other` in the same turns; the second: the
        median."""
        pairs = zip(self.samples[name], self.samples[other], strict=True)
        return _quartiles([one / another for one, another in pairs])

    def spread(self) -> float:
        """The largest interquartile range of a ratio to the first run, as a share of its median;
        where there is one run, that of its times."""
        first, *others = self.samples
        of = [self.ratio(name, first) for name in others] or [_quartiles(self.samples[first])]
        return max((high - low) / median for low, median, high in of)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def by_turns(
    runs: Mapping[str, Callable[[], float]],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Runs all by turns, until they are steady.

    Args:
        runs: each does its work once and returns the seconds that it took.
        seconds: of one attempt.
        clock: what the time for all of it is taken from.
    """
    began, steadiest = clock(), None
    lasted = _warm(runs, seconds, clock)
    a_turn = sum(lasted.values())
    repeats = {
        name: min(max(int(_OF_A_TURN * a_turn / lasted[name]), 1), _REPEATED) for name in runs
    }
    for attempt in range(1, ATTEMPTS + 1):
        times = Times(_samples(runs, repeats, seconds, a_turn, attempt > 1), attempt)
        if steadiest is None or times.spread() < steadiest.spread():
            steadiest = times
        tried_both = attempt > 1 or times.spread() <= FAILED
        if times.spread() <= STEADY or (tried_both and clock() - began > _PATIENCE * seconds):
            break
    return steadiest._replace(attempts=attempt)


def _warm(
    runs: Mapping[str, Callable[[], float]], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """How long each run lasted at last, once none is faster than before, or time is up.

    That is more than what it returns where a process begins before it does its work.
    """
    began, fastest, lasted = clock(), dict.fromkeys(runs, math.inf), dict.fromkeys(runs, 0.0)
    while True:
        before = dict(fastest)
        for name, run in runs.items():
            run_began = clock()
            fastest[name] = min(run(), fastest[name])
            lasted[name] = max(clock() - run_began, 1e-9)
        settled = all(fastest[name] > _AS_FAST * before[name] for name in runs)
        if settled or clock() - began > seconds:
            return lasted


def _samples(
    runs: Mapping[str, Callable[[], float]],
    repeats: Mapping[str, int],
    seconds: float,
    a_turn: float,
    behind_itself: bool,
) -> dict[str, list[float]]:
    turns = math.ceil(_SAMPLE / a_turn)
    count = max(int(seconds / (turns * a_turn)), FEWEST)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                if behind_itself:
                    run()
                took[name].append(statistics.median(run() for _ in range(repeats[name])))
        for name, times in took.items():
            samples[name].append(statistics.median(times))
    return samples
