"""No free port: said at once. In a network namespace of its own, whose range of ports is as small as can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
ip link set lo up
echo "60000 60001" > /proc/sys/net/ipv4/ip_local_port_range
exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a network namespace needs root")
def test_no_free_port_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raypipe", "train", "configs/quickstart.yaml"]
    ended = subprocess.run(
        ["unshare", "--net", "sh", "-c", SCRIPT, "sh", *command],
        cwd=ROOT,
        env={**os.environ, "RAYPIPE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "raypipe: no free port: Ray needs about 25 on this machine, 2 are to be had" in ended.stderr.splitlines()[-1]
