"""Print results as Markdown tables, so that docs/performance.md can quote them unchanged."""

import os
import platform
from collections.abc import Sequence
from statistics import median


def print_machine(*remarks: str) -> None:
    """Print the versions and the kind of machine on which the numbers were measured."""
    import django

    print(f"Python {platform.python_version()}, Django {django.get_version()}, ", end="")
    print(f"{platform.system()}, {os.cpu_count()} cores.", *remarks)
    print()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; align the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for cells in (head, rule, *rows):
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print(f"| {' | '.join(padded)} |")
    print()


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """
    Return the median of the ratios of all rounds.

    Both sides of a round run one directly after the other, so a change in the machine's load
    between rounds does not change the ratio.
    """
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def print_verdict(subject: str, value: float, limit: float, unit: str) -> None:
    """Print whether a budget is met, which is the case if `value` is at most `limit`."""
    verdict = "met" if value <= limit else "NOT MET"
    print(f"Budget {verdict}: {subject} is {value:.2f} {unit} (at most {limit:.2f} {unit}).")
