"""Two things timed alternately in one process, and a table of their ratios."""

import itertools
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table


def ratio(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median of (time of first) / (time of second), and the medians of both in milliseconds."""
    for run in (first, second):
        jax.block_until_ready(run())
    seconds = np.empty((repeats, 2))
    for repeat, (column, run) in itertools.product(range(repeats), enumerate((first, second))):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds[repeat, column] = time.perf_counter() - start
    first_ms, second_ms = np.median(seconds, axis=0) * 1e3
    return float(np.median(seconds[:, 0] / seconds[:, 1])), float(first_ms), float(second_ms)


# What rows are in, by the names of their fields.
UNITS = {"ms": "ms", "us": "µs", "mb": "MB", "mflop": "MFLOP"}


class Timings:
    """What was timed: rows for the table, and those of them that have a name as figures."""

    def __init__(self, repeats: int):
        self.repeats, self.rows, self.figures = repeats, [], {}

    def add(self, what: str, against: str, first, second, *, name: str | None, tokens: int = 0, **more: object) -> dict:
        """Time two things against each other. A figure with a name is one that docs and users rely on.

        Args:
            tokens: that each of them gives, where it is of interest how many a second that makes.

        Returns:
            The row, with its `ratio`.
        """
        value, ms, other_ms = ratio(first, second, self.repeats)
        if tokens:
            more |= {"tokens_per_s": round(tokens / ms * 1e3), "against_tokens_per_s": round(tokens / other_ms * 1e3)}
        return self._add(what, against, value, "ms", (ms, other_ms), name, more)

    def add_given(
        self, what: str, against: str, first: float, second: float, unit: str, *, name: str | None = None, **more
    ) -> dict:
        """Two amounts that need no timing. Returns the row."""
        return self._add(what, against, first / second, unit, (first, second), name, more)

    def _add(self, what, against, ratio, unit, amounts, name, more) -> dict:
        row = {"what": what, "against": against, "ratio": ratio, unit: amounts[0], f"against_{unit}": amounts[1]} | more
        self.rows.append(row)
        if name:
            self.figures[name] = row["ratio"]
        print(f"{what} / {against}: {ratio:.4g}", file=sys.stderr, flush=True)
        return row

    def show(self, title: str) -> None:
        table = Table(title=title)
        for column, justify in (("", "left"), ("against", "left"), ("ratio", "right"), ("", "right"), ("", "left")):
            table.add_column(column, justify=justify)
        for row in self.rows:
            unit = next(unit for unit in UNITS if unit in row)
            first, second = (f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in (row[unit], row[f"against_{unit}"]))
            sizes = f"{first} / {second} {UNITS[unit]}"
            known = {"what", "against", "ratio", unit, f"against_{unit}"}
            more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
            table.add_row(row["what"], row["against"], f"{row['ratio']:.4g}", sizes, more)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
