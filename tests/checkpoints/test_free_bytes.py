"""Free memory as the kernel and a container's control groups tell it."""

from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints.free_bytes import free_device_bytes, free_disk_bytes, free_host_bytes
from moe_mt.errors import BackendUnavailableError

GB = 1_000_000_000


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       32000000 kB\nMemFree:  100 kB\nMemAvailable:   16000000 kB\n"


def test_this_machine_has_memory_and_disk(tmp_path):
    assert free_host_bytes() > 0
    assert free_disk_bytes(tmp_path / "not" / "there") == pytest.approx(
        free_disk_bytes(tmp_path), rel=0.1
    )
    assert free_device_bytes(torch.device("cpu")) is None


def test_available_memory_is_taken_where_there_is_no_container(tmp_path):
    assert free_host_bytes(system(tmp_path, {"proc/meminfo": MEMINFO})) == 16_384_000_000


def test_unknown_where_the_system_does_not_say(tmp_path):
    assert free_host_bytes(tmp_path) is None


def test_version_2_control_group_limits(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pod/app\n",
        "sys/fs/cgroup/pod/app/memory.max": "max\n",
        "sys/fs/cgroup/pod/app/memory.current": f"{GB}\n",
        # The limit stands one group above the process.
        "sys/fs/cgroup/pod/memory.max": f"{4 * GB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{3 * GB}\n",
        "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GB}\nactive_file {GB // 2}\n",
    }
    # 4 - 3, and 1.5 of file cache that the kernel gives back.
    assert free_host_bytes(system(tmp_path, files)) == 2.5 * GB


def test_version_2_control_group_seen_from_inside_its_namespace(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GB}\n",
        "sys/fs/cgroup/memory.current": f"{GB // 4}\n",
    }
    assert free_host_bytes(system(tmp_path, files)) == GB - GB // 4


def test_version_1_control_group_limits(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/\n",
        "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": f"{2 * GB}\n",
        "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes": f"{GB}\n",
        "sys/fs/cgroup/memory/docker/1/memory.stat": f"total_inactive_file {GB // 2}\n",
    }
    assert free_host_bytes(system(tmp_path, files)) == 1.5 * GB


def test_no_limit_leaves_the_kernels_figure(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/\n",
        # What version 1 says where there is no limit.
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
    }
    assert free_host_bytes(system(tmp_path, files)) == 16_384_000_000


def test_a_group_over_its_limit_has_nothing_left(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "10\n",
        "sys/fs/cgroup/memory.current": "20\n",
    }
    assert free_host_bytes(system(tmp_path, files)) == 0


def test_a_device_that_is_not_there():
    with pytest.raises(BackendUnavailableError, match="cuda:63"):
        free_device_bytes(torch.device("cuda:63"))


@pytest.mark.gpu
def test_a_device_says_how_much_is_free():
    free = free_device_bytes(torch.device("cuda"))
    assert free is not None
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
