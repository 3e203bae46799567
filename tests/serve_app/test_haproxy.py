"""The serving manifest's settings, HAProxy among them, under clients that leave: in a Ray of its own, started with them."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.serve_app.conftest import free_port

ROOT = Path(__file__).parent.parent.parent
LOCAL = {
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("axn-haproxy")),
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # for the test's own handles
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no balancer has to hear of the end
}


def test_clients_that_leave_take_their_pairs_along_behind_haproxy():
    (service,) = [d for d in yaml.safe_load_all((ROOT / "cluster/rayservice.yaml").read_text()) if d["kind"] == "RayService"]
    (container,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    settings = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"} <= set(settings)
    ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}  # its own are fixed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serve_app/test_load.py", "-k", "leaves"]
    environment = {**os.environ, **settings, **LOCAL, **ports}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "3 passed" in ended.stdout
