"""What the benchmarks print: tables in Markdown, so that docs/performance.md can quote them."""

import os
import platform
from collections.abc import Sequence
from statistics import median


def print_machine(*remarks: str) -> None:
    """Say in general words where the numbers come from."""
    import django

    print(f"Python {platform.python_version()}, Django {django.get_version()}, ", end="")
    print(f"{platform.system()}, {os.cpu_count()} cores.", *remarks)
    print()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; every column but the first is of numbers, and stands to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for cells in (head, rule, *rows):
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print(f"| {' | '.join(padded)} |")
    print()


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """
    Return the median of the ratios of each round.

    The two sides of a round ran one after the other, so what else the machine did at that time
    was about the same for both.
    """
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def print_verdict(what: str, value: float, limit: float, unit: str) -> None:
    """Print whether a budget is met."""
    verdict = "met" if value <= limit else "NOT MET"
    print(f"Budget {verdict}: {what} is {value:.2f} {unit} (at most {limit:.2f} {unit}).")
