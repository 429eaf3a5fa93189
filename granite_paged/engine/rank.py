"""Who goes first: a request's arrival, moved ahead by its priority.

Ranks decide who comes in, whose prompt is computed first and who gives up pages. A preempted job
keeps its rank. Since priority is worth a fixed number of arrivals, only a bounded number of later
requests can go before any request. `docs/guides/scheduling.md` says what follows for its wait.
"""

from __future__ import annotations

from typing import NamedTuple

PRIORITY_WORTH = 1000
"""Number of arrivals that one step of priority puts a request ahead by."""


class Rank(NamedTuple):
    """Position in the order of all requests: the lowest goes first.

    Attributes:
        place: number of the arrival, less `PRIORITY_WORTH` for each step of priority.
        priority: the request's own.
    """

    place: int
    priority: int

    @classmethod
    def of(cls, arrival: int, priority: int) -> Rank:
        """Return the rank of the `arrival`-th request."""
        return cls(arrival - priority * PRIORITY_WORTH, priority)

    def preempts(self, other: Rank) -> bool:
        """Return whether a waiting request of this rank may take a running one's row and pages.

        Requests of the same priority never do.
        """
        return self.place < other.place and self.priority > other.priority


FIRST = Rank(0, 0)
"""Rank of a job until its arrival is counted."""
