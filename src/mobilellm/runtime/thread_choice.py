"""How many threads a pass through a model runs on, where nobody says: what measures best while it runs.

The results are the same bit for bit on any number of threads, which may therefore change from one pass to the
next: only the clock sees it. So other numbers are tried now and then, in turns with the one in use, by passes
that are wanted anyway. Nothing is measured before the first token, nothing is kept in a file that may be of
another machine, and where other programs come or go, the number follows.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence

from mobilellm.runtime.cores import Cores, cores

MOST_THREADS = 256
MARGIN = 0.05
"""What fewer threads may take longer. Medians of equal things differ by 1 to 3 % on a machine that does other
things too; and a core less is left to those, and takes less power."""
_ROUNDS = 5
"""In each, every number of threads has its turn. Medians count: two strange ones of five do not."""
_HOPELESS = 1.3
"""Two passes that all took so many times what the best one's did are enough."""
_UNMEASURED = 32
"""Passes before anything is tried: a short answer does not pay for it."""
_AGAIN = 1000
"""Passes after which the neighbours are tried anew, with 8 to some 30 passes: what runs beside it changes."""
_MOST_ALIKE = 16
"""Tokens of a pass whose time depends on their number so much that each number is measured by itself."""


def thread_choices(threads: int | None) -> ThreadChoices:
    """So many, or by None what measures best. Raises ValueError for a number that is none of threads."""
    if threads is None:
        return ThreadChoices.measured(cores())
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads = {threads} must lie in 1 … {MOST_THREADS}")
    return ThreadChoices.fixed(threads)


class ThreadChoice:
    """For passes that are alike: of one token each, say."""

    def __init__(self, counts: Sequence[int], first: int) -> None:
        """`counts`: those that may be tried, in order; `first`: the one to begin with."""
        self._counts, self._course = counts, _course(counts, first)
        self.threads = next(self._course)
        """For the next pass."""

    def took(self, seconds: float) -> None:
        """What a pass took on `threads`, which may be another number then."""
        try:
            self.threads = self._course.send(seconds)
        except StopIteration:  # a Ctrl-C came while it thought about the pass before
            self._course = _course(self._counts, self.threads)
            next(self._course)


class ThreadChoices:
    """For passes of any number of tokens: of few each number is measured, many take all fast cores."""

    def __init__(self, counts: Sequence[int], first: int, many: int) -> None:
        """`counts` and `first` of passes of few tokens; `many`: the threads of others."""
        self._counts, self._first, self._many = counts, first, many
        self._choices: dict[int, ThreadChoice] = {}
        self._measured: ThreadChoice | None = None
        self._seconds = 0.0

    @classmethod
    def measured(cls, there: Cores) -> ThreadChoices:
        counts = sorted({there.first_threads, *counts_up_to(there.usable)})
        return cls(counts, there.first_threads, there.prompt_threads)

    @classmethod
    def fixed(cls, threads: int) -> ThreadChoices:
        return cls([threads], threads, threads)

    def threads(self, tokens: int) -> int:
        """For the next pass of so many."""
        return self._many if tokens > _MOST_ALIKE else self._choice(tokens).threads

    def begin(self, tokens: int) -> int:
        """A pass of so many begins, on the number of threads that is returned."""
        if self._measured is not None:
            self._measured.took(self._seconds)
        self._measured, self._seconds = self._choice(tokens) if tokens <= _MOST_ALIKE else None, 0.0
        return self.threads(tokens)

    def spend(self, seconds: float) -> None:
        """A part of the pass: its states, or logits after it."""
        self._seconds += seconds

    def drop(self) -> None:
        """The pass does not count: it was cancelled."""
        self._measured = None

    def _choice(self, tokens: int) -> ThreadChoice:
        if tokens not in self._choices:
            self._choices[tokens] = ThreadChoice(self._counts, self._first)
        return self._choices[tokens]


def counts_up_to(most: int) -> list[int]:
    """The numbers worth a try: 1, 2, 3, 4, 6, 8, 12, 16, 24 …, and `most` itself where an engine takes it."""
    most = min(most, MOST_THREADS)
    doubled = [count << power for power in range(most.bit_length()) for count in (2, 3)]
    return sorted({1, most, *(count for count in doubled if count < most)})


def fewest_of_the_best(seconds: Mapping[int, float]) -> int:
    """The fewest threads within the margin of the fastest; `seconds` of a pass by numbers of threads."""
    enough = (1 + MARGIN) * min(seconds.values())
    return min(count for count, its_seconds in seconds.items() if its_seconds <= enough)


# Generators yield on how many threads the next pass is to run, and are sent the seconds that it took.


def _course(counts: Sequence[int], first: int) -> Generator[int, float, None]:
    best, alone = first, _UNMEASURED
    while True:
        for _ in range(alone):
            yield best
        best = yield from _best_around(best, counts)
        alone = _AGAIN


def _best_around(best: int, counts: Sequence[int]) -> Generator[int, float, int]:
    """From one number to its neighbours, and on in the direction in which it gets better."""
    seconds = {best: 1.0}  # in those of the first: what was measured at two times is compared through a third
    while new := _neighbours(best, counts) - seconds.keys():
        medians = yield from _medians(best, new)
        seconds |= {count: seconds[best] * medians[count] / medians[best] for count in new}
        best = fewest_of_the_best(seconds)
    return best


def _neighbours(count: int, counts: Sequence[int]) -> set[int]:
    place = counts.index(count)
    return {*counts[max(0, place - 1) : place], *counts[place + 1 : place + 2]}


def _medians(best: int, others: Collection[int]) -> Generator[int, float, dict[int, float]]:
    """Seconds of a pass on `best` and on others, in turns. Others that are hopeless end after two rounds."""
    from statistics import median  # here, long after the first token: it brings in decimals and fractions

    seconds: dict[int, list[float]] = {count: [] for count in (best, *others)}
    trying = list(seconds)
    for _ in range(_ROUNDS):
        for count in trying:
            yield count  # in which threads wake, and what each multiplies comes into its cache
            seconds[count].append((yield count))
        too_long = _HOPELESS * max(seconds[best])
        trying = [count for count in trying if len(seconds[count]) < 2 or min(seconds[count]) <= too_long]
        if trying == [best]:
            break
    return {count: median(each) for count, each in seconds.items()}
