"""Tests that comments, docstrings and documentation have few expressions that are hard to read."""

import pytest

from tests.repository.prose import GROUPS, Count, count_prose, python_texts, report, script_texts
from tests.support.paths import ROOT

# The maximum number of listed expressions per 1,000 words, by group of files. Lower a budget when
# the text improves; never raise one.
BUDGETS = {
    "django_tasks_local": 3,
    "django_tasks_local_sse": 1,
    "django_tasks_local_sse/static": 35,
    "tests": 2,
    "benchmarks": 1,
    "stress": 1,
    "example.py": 36,
    "README.md": 1,
    "CHANGELOG.md": 1,
    "CONTRIBUTING.md": 2,
    "docs": 2,
}

PYTHON = '''"""A module."""

# Whoever reads this
# hears of it.
text = "who reads this?"  # so long
'''


def test_every_group_has_a_budget() -> None:
    assert set(BUDGETS) == set(GROUPS)


@pytest.mark.parametrize("group", BUDGETS)
def test_prose_is_within_budget(group: str) -> None:
    count = count_prose(ROOT, [ROOT / group])[group]
    assert count.words > 100, (
        f"{group}: found only {count.words} words of comments or documentation"
    )
    assert count.per_thousand <= BUDGETS[group], (
        f"{group}: {count.per_thousand:.1f} expressions per 1,000 words, and {BUDGETS[group]} are "
        f"allowed. Name the actor, the action and the object in:\n{report(count)}"
    )


def test_texts_of_python() -> None:
    texts = [(1, "A module."), (3, "Whoever reads this hears of it."), (5, "so long")]
    assert list(python_texts(PYTHON)) == texts


def test_texts_of_scripts() -> None:
    source = "/* One\n   comment. */\nlet text = 1; // another\n"
    assert [line for line, _ in script_texts(source)] == [1, 3]


def test_hits_of_a_text() -> None:
    count = Count()
    count.add("file.py:3", "Whoever reads this\n hears of it. This sentence is plain.")
    assert (count.words, count.hits) == (10, 2)
    assert report(count) == "file.py:3: Whoever reads this hears of it."
