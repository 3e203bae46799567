"""What each kind of process below a command holds in memory, or below this process has computed."""

import re
import subprocess
import time

import psutil

EVERY_S = 0.25
# Ray names its workers by what they do; what has another name is Ray itself (raylet, GCS, agents).
KINDS = [
    re.compile(r"ray::MapWorker\(MapBatches\((\w+)\)"),
    re.compile(r"ray::ServeReplica:\w+:(\w+)"),
    re.compile(r"ray::(\w+)"),
]


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


def cpu_seconds(rest="ray"):
    """CPU seconds so far by kind below this process, which is `driver`; its children that ended are `clients`.

    What has no name of Ray's is `rest`; all that is not below this process, `others`.
    """
    me, busy = psutil.Process(), psutil.cpu_times()
    own = me.cpu_times()
    seconds = {"driver": own.user + own.system, "clients": own.children_user + own.children_system}
    for member in me.children(recursive=True):
        try:
            times, title = member.cpu_times(), " ".join(member.cmdline()[:1])
        except psutil.Error:
            continue
        kind = name_kind(title, rest)
        seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
    return {**seconds, "others": busy.user + busy.nice + busy.system - sum(seconds.values())}


def name_kind(title, rest="ray"):
    """`ScoreActor` of `ray::MapWorker(MapBatches(ScoreActor)).submit`, `Ingress` of `ray::ServeReplica:axn:Ingress`."""
    found = next((match for kind in KINDS if (match := kind.match(title))), None)
    return found[1] if found else rest
