"""Threads that sleep while they wait, as many as a container may run."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import threads
from fastdiff.studio.ranks import launch

HOST = "docker/0123abcd"
GROUPS = {  # /proc/self/cgroup, files below /sys/fs/cgroup, the quota
    "v2 container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "v2 no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "v2 limit above": ("0::/pod/box\n", {"pod/cpu.max": "50000 100000\n", "pod/box/cpu.max": "200000 100000\n"}, 0.5),
    "v2 root": ("0::/user.slice\n", {}, None),
    "v1 container": (
        f"3:cpu,cpuacct:/{HOST}\n0::/{HOST}\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        3.0,
    ),
    "v1 own path": (
        f"5:cpuset:/\n3:cpu:/{HOST}\n",
        {f"cpu/{HOST}/cpu.cfs_quota_us": "25000\n", f"cpu/{HOST}/cpu.cfs_period_us": "50000\n",
         "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        0.5,
    ),
    "v1 no limit": ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    "nonsense": ("0::/\n", {"cpu.max": "lots\n"}, None),
}  # fmt: skip


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("case", GROUPS)
def test_the_quota_of_a_container(tmp_path, case):
    groups, files, quota = GROUPS[case]
    assert threads.processor_quota(machine(tmp_path, groups, files)) == quota


def test_a_machine_without_control_groups(tmp_path):
    assert threads.processor_quota(tmp_path) is None


@pytest.mark.parametrize("share", [0.3, 1.0, 4.0])
def test_threads_are_as_many_as_the_quota_allows(tmp_path, share):
    """Of four processors; part of one is rounded up, and a quota above what there is says nothing."""
    quota = share * threads.processors()
    found: dict[str, str] = {}
    threads.settle(found, machine(tmp_path, "0::/\n", {"cpu.max": f"{round(quota * 100_000)} 100000"}))
    expected = {"OMP_NUM_THREADS": str(math.ceil(quota))} if quota < threads.processors() else {}
    waits = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    assert found == {"TRANSFORMERS_VERBOSITY": "error"} | waits | expected


@pytest.mark.parametrize("waits", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}])
def test_what_the_user_has_set_stays(tmp_path, waits):
    own = {**waits, "OMP_NUM_THREADS": "7", "TRANSFORMERS_VERBOSITY": "info"}
    found = dict(own)
    threads.settle(found, machine(tmp_path, "0::/\n", {"cpu.max": "1000 100000"}))
    assert found == own


@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_itself_says_so(given, policy):
    """Of a command that loads torch: OpenMP prints what it works with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    command = [sys.executable, "-m", "fastdiff", "env", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    said = set(re.findall(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", done.stderr))
    if not said:
        pytest.skip("this torch is built without OpenMP")
    assert said == {policy}


def rank_waits() -> int:
    return 0 if os.environ["OMP_WAIT_POLICY"] == "PASSIVE" else 3


def test_ranks_sleep_too(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert launch(1, 60, rank_waits) == 0
