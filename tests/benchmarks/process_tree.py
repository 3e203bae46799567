"""Runs a command and watches what each kind of process below it holds in memory."""

import re
import subprocess
import time

import psutil

EVERY_S = 0.25
# Ray names its workers by what they do; what has another name is Ray itself (raylet, GCS, agents).
KINDS = [re.compile(r"ray::MapWorker\(MapBatches\((\w+)\)"), re.compile(r"ray::(\w+)")]


def run_watched(command, seconds):
    """Run it for at most so many seconds: (its exit code, None where it was cut off; seconds; peaks in bytes by kind).

    A process's `own` memory is what it does not share (no object store, no mapped file), `resident` all that it touches.
    The kind `tree` sums `own` over all processes at one time.
    """
    begun, peaks = time.monotonic(), {}
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    while (code := process.poll()) is None and time.monotonic() - begun < seconds:
        observe(root, peaks)
        time.sleep(EVERY_S)
    if code is None:
        for member in [*root.children(recursive=True), root]:
            member.kill()
        process.wait()
    return code, time.monotonic() - begun, peaks


def observe(root, peaks):
    """Raise the peaks to what is held now."""
    whole = 0
    for member in [root, *root.children(recursive=True)]:
        try:
            memory, title = member.memory_info(), " ".join(member.cmdline()[:1])
        except psutil.Error:
            continue
        kind = "driver" if member.pid == root.pid else name_kind(title)
        own = memory.rss - memory.shared
        whole += own
        held = peaks.setdefault(kind, {"own": 0, "resident": 0})
        held["own"], held["resident"] = max(held["own"], own), max(held["resident"], memory.rss)
    tree = peaks.setdefault("tree", {"own": 0})
    tree["own"] = max(tree["own"], whole)


def name_kind(title):
    """`ScoreActor` of `ray::MapWorker(MapBatches(ScoreActor)).submit`, `_sum_share` of `ray::_sum_share`."""
    found = next((match for kind in KINDS if (match := kind.match(title))), None)
    return found[1] if found else "ray"
