"""count_cpus(): the CPUs of the process and the limits of its control groups."""

from pathlib import Path

import pytest

from django_tasks_local import cpus
from django_tasks_local.conf import ProcessOptions
from django_tasks_local.cpus import container_limit, parse_v1, parse_v2


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("150000 100000\n", 1.5),
        ("max 100000\n", None),
        ("", None),
        ("max", None),
        ("100000 0", None),
        ("broken", None),
    ],
)
def test_limit_of_version_2(text: str, limit: float | None) -> None:
    assert parse_v2(text) == limit


@pytest.mark.parametrize(
    ("quota", "period", "limit"),
    [("50000\n", "100000\n", 0.5), ("-1\n", "100000\n", None), ("", "", None)],
)
def test_limit_of_version_1(quota: str, period: str, limit: float | None) -> None:
    assert parse_v1(quota, period) == limit


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("path", ["/", "/outer", "/outer/inner", "/unknown/outer"])
def test_lowest_limit_of_all_groups_counts(path: str, tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text(f"0::{path}\n", encoding="utf-8")
    write(root, cpu__max="200000 100000\n")
    write(root / "outer", cpu__max="100000 100000\n")
    write(root / "outer/inner", cpu__max="max 100000\n")
    assert container_limit(root, membership) == (1 if path.startswith("/outer") else 2)


def test_limit_in_the_folder_of_a_controller(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    text = "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n"
    membership.write_text(text, encoding="utf-8")
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert container_limit(root, membership) == 0.5


def test_system_without_control_groups(tmp_path: Path) -> None:
    assert container_limit(tmp_path, tmp_path / "missing") is None


def test_workers_ignore_the_limit_of_the_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MAX_WORKERS of processes is at most the container's limit, rounded up."""
    monkeypatch.setattr(cpus, "container_limit", lambda: 0.5)
    assert ProcessOptions().max_workers == 1
