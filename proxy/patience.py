"""When a draw stops waiting for its slower calls: a quorum is there, or they take far longer than others do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from proxy.candidates import Candidate
from proxy.strategies.history import LatestValues

_KNOWN_ANSWERS = 32
"""Of a route, with fewer of which nothing is said of how long its answers take."""
_USUAL_SHARE = 0.95
_OWN_FACTOR = 2.0
"""However quick a route's answers are: where a prompt's own take long, the rest of them may take twice as long."""
_OVERDUE_FACTOR = 1.1
"""What answers so late that nobody waited for it any more is not the only one: the rest get a little longer."""
_LEAST_S = 1.0
"""A lost packet or a pause of this process takes that long, and says nothing of the upstream."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a draw of several calls waits for all of them."""

    quorum: int | None
    """Good candidates that are enough; None: all are waited for."""
    straggler_factor: float
    """Once half are there, the rest get this many times as long as those took; 0: no limit."""
    straggler_min_s: float
    """But this many seconds at least."""
    least: int
    """Answers without which nothing is given up."""
    is_good: Callable[[Candidate], bool]
    learnt_factor: float = 0.0
    """Of what is usual on the route, where that is known: nobody gets longer, nor less. 0: the route says nothing."""
    durations: LatestValues | None = None
    """Seconds from the beginning of a draw to each of its answers, on the route: read, and added to."""
    outlasts_deadline: bool = False
    """With fewer than `least` answers, drawing does not end with the deadline, but soon after they have come."""

    def learn(self, answered_s: float) -> None:
        if self.durations is not None:
            self.durations.keep(answered_s)

    def limit_s(self, slowest_s: float, *, half_there: bool) -> float | None:
        """Seconds that all may take where the slowest of those that are there took `slowest_s`; None: any time.

        What is usual on the route can only shorten what the prompt's own answers allow: where a long prompt's take long
        on a quick route, or a short one's are quick on a slow route, the others of the same prompt know better.
        """
        if self.straggler_factor == 0:
            return None
        limits = []
        if half_there:
            limits.append(max(self.straggler_factor * slowest_s, slowest_s + self.straggler_min_s))
        if self.learnt_factor and self.durations is not None and len(self.durations) >= _KNOWN_ANSWERS:
            usual_s = self.durations.quantile(_USUAL_SHARE)
            # A single one that is quick, such as a refusal, is no sign yet that the others hang.
            factor = self.learnt_factor if half_there else max(self.learnt_factor, self.straggler_factor)
            limits.append(max(factor * usual_s, _OWN_FACTOR * slowest_s, slowest_s + _LEAST_S))
        return min(limits, default=None)


class Waiting:
    """One draw's waiting. `give_up` is called at most once, when what is still running is not worth waiting for.

    `deadline`, in the loop's time, is one that `patience` outlasts.
    """

    def __init__(
        self, patience: Patience, count: int, give_up: Callable[[], None], deadline: float | None = None
    ) -> None:
        self._patience = patience
        self._count = count
        self._give_up = give_up
        self._good = self._answered = self._failed = 0
        self._slowest_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._half_there = self._was_overdue = False
        """What the timer was set by."""
        self._over = False
        self.is_overdue = False
        """The deadline has passed."""
        self._due = None if deadline is None else self._loop.call_at(deadline, self._fall_due)

    def arrived(self, candidate: Candidate) -> None:
        if self._over:
            return
        patience = self._patience
        if candidate.failure is not None:
            # How fast calls fail says nothing of how long answers take; but nobody waits for these any more.
            self._failed += 1
        else:
            self._answered += 1
            self._slowest_s = self._loop.time() - self._started_at
            patience.learn(self._slowest_s)
            # Without a quorum all are equal: a draw that waits for all does not judge them twice.
            self._good += patience.quorum is not None and patience.is_good(candidate)
        if self._good == patience.quorum:
            self._end()
        else:
            self._watch_stragglers()

    def close(self) -> None:
        self._over = True
        self._stop_timer()
        if self._due is not None:
            self._due.cancel()

    def _watch_stragglers(self) -> None:
        """Sets the timer: answers tell how long the rest may take."""
        if self._answered < max(self._patience.least, 1) or self._answered + self._failed == self._count:
            self._stop_timer()
            return
        half = (self._count - self._failed + 1) // 2
        if self._patience.quorum is not None:
            half = min(half, max(self._patience.quorum - 1, 1))
        before = (self._half_there, self._was_overdue)
        self._half_there, self._was_overdue = self._answered >= half, self.is_overdue
        if self._timer is not None and before == (self._half_there, self._was_overdue):
            return  # More answers of the same kind put the end off, if anything: soon enough to see when it rings.
        self._stop_timer()
        ends_at = self._ends_at()
        if ends_at is not None:
            self._timer = self._loop.call_at(ends_at, self._ring)

    def _ends_at(self) -> float | None:
        limit_s = self._patience.limit_s(self._slowest_s, half_there=self._half_there)
        if self.is_overdue:
            limit_s = min(limit_s or math.inf, _OVERDUE_FACTOR * self._slowest_s)
        return None if limit_s is None else self._started_at + limit_s

    def _ring(self) -> None:
        self._timer = None
        ends_at = self._ends_at()
        if ends_at is None:
            return
        # Timers may ring a little early by the loop's clock.
        if self._loop.time() + 0.001 < ends_at:
            self._timer = self._loop.call_at(ends_at, self._ring)
        else:
            self._end()

    def _fall_due(self) -> None:
        self.is_overdue = True
        if self._answered >= self._patience.least:
            self._end()

    def _end(self) -> None:
        self.close()
        self._give_up()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
