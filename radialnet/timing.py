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


class Timings:
    """What was timed: rows for the table, and those of them that have a name as figures."""

    def __init__(self, repeats: int):
        self.repeats, self.rows, self.figures = repeats, [], {}

    def add(
        self, what: str, against: str, first, second, *, name: str | None, tokens: int = 0, **more: object
    ) -> float:
        """Time two things against each other. A figure with a name is one that docs and users rely on.

        Args:
            tokens: that each of them gives, where it is of interest how many a second that makes.

        Returns:
            The ratio.
        """
        value, ms, other_ms = ratio(first, second, self.repeats)
        if tokens:
            more |= {"tokens_per_s": round(tokens / ms * 1e3), "against_tokens_per_s": round(tokens / other_ms * 1e3)}
        self._add({"what": what, "against": against, "ratio": value, "ms": ms, "against_ms": other_ms, **more}, name)
        return value

    def add_bytes(self, what: str, against: str, first: int, second: int, *, name: str | None) -> None:
        row = {"what": what, "against": against, "ratio": first / second, "mb": first / 1e6, "against_mb": second / 1e6}
        self._add(row, name)

    def _add(self, row: dict, name: str | None) -> None:
        self.rows.append(row)
        if name:
            self.figures[name] = row["ratio"]
        print(f"{row['what']} / {row['against']}: {row['ratio']:.3f}", file=sys.stderr, flush=True)

    def show(self, title: str) -> None:
        table = Table(title=title)
        for column, justify in (("", "left"), ("against", "left"), ("ratio", "right"), ("", "right"), ("", "left")):
            table.add_column(column, justify=justify)
        for row in self.rows:
            unit = "ms" if "ms" in row else "mb"
            sizes = f"{row[unit]:.0f} / {row['against_' + unit]:.0f} {unit.replace('mb', 'MB')}"
            known = {"what", "against", "ratio", unit, f"against_{unit}"}
            more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
            table.add_row(row["what"], row["against"], f"{row['ratio']:.3f}", sizes, more)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
