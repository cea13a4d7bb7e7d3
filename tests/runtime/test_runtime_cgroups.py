"""Limits of control groups, read from made-up file systems of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from llm_runtime.runtime import cgroups

MEMORY = 7 * 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors and 7 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"total": MEMORY}))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """kernel(groups, mounts, files) makes /proc/self and the mounted hierarchies, whose paths begin at `tmp_path`."""

    def make(groups: str, mounts: list[tuple[str, str, str, str]], files: dict[str, str]) -> None:
        proc = tmp_path / "proc"
        proc.mkdir()
        (proc / "cgroup").write_text(groups)
        lines = [
            f"31 23 0:{n} {root} {tmp_path}{place} rw,relatime shared:4 - {kind} {kind} rw,{options}\n"
            for n, (root, place, kind, options) in enumerate(mounts)
        ]
        (proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "".join(lines))
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        monkeypatch.setattr(cgroups, "_PROC", proc)

    return make


V2 = [("/", "/sys", "cgroup2", "nsdelegate")]
V1 = [("/", "/cpu", "cgroup", "cpu,cpuacct"), ("/", "/memory", "cgroup", "memory"), *V2]


def test_without_limits(kernel):
    kernel("0::/user/app\n", V2, {"sys/user/app/cpu.max": "max 100000", "sys/user/app/memory.max": "max"})
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (8, MEMORY)


def test_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cgroups, "_PROC", tmp_path)
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (8, MEMORY)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("100000 100000", 1), ("150000 100000", 1), ("50000 100000", 1), ("400000 100000", 4), ("9000 1000", 8)],
)
def test_version_2(kernel, quota: str, count: int):
    kernel(
        "0::/app\n", V2, {"sys/app/cpu.max": quota, "sys/app/memory.max": "1000000", "sys/app/memory.high": "900000"}
    )
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (count, 900_000)


def test_the_narrowest_of_nested_groups_holds(kernel):
    files = {"sys/a/cpu.max": "200000 100000", "sys/a/b/cpu.max": "max 100000", "sys/a/b/c/cpu.max": "300000 100000"}
    kernel("0::/a/b/c\n", V2, {**files, "sys/a/memory.max": "5000", "sys/a/b/c/memory.max": "6000"})
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (2, 5000)


def test_version_1(kernel):
    files = {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/b/cpu.cfs_quota_us": "-1"}
    periods = {"cpu/a/cpu.cfs_period_us": "100000", "cpu/a/b/cpu.cfs_period_us": "100000"}
    limits = {"memory/x/memory.limit_in_bytes": "123456", "memory/memory.limit_in_bytes": "9223372036854771712"}
    kernel("3:cpu,cpuacct:/a/b\n2:memory:/x\n1:name=systemd:/y:z\n0::/q\n", V1, {**files, **periods, **limits})
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (3, 123_456)


@pytest.mark.parametrize("group", ["/docker/abc", "/", "/docker/abc/inner"])
def test_a_container_whose_mount_begins_at_its_group(kernel, group: str):
    mounts = [("/docker/abc", "/cpu", "cgroup", "cpu"), ("/docker/abc", "/memory", "cgroup", "memory")]
    files = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "77"}
    kernel(f"2:cpu:{group}\n1:memory:{group}\n", mounts, files)
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (2, 77)


def test_affinity_beside_a_quota(kernel, monkeypatch: pytest.MonkeyPatch):
    kernel("0::/app\n", V2, {"sys/app/cpu.max": "600000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert cgroups.cpu_count() == 2


def test_nonsense_is_no_limit(kernel):
    kernel("0::/app\n", V2, {"sys/app/cpu.max": "many", "sys/app/memory.max": "much"})
    assert (cgroups.cpu_count(), cgroups.memory_bytes()) == (8, MEMORY)
