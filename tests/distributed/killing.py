"""Kills a worker of Ray Train in the middle of its work."""

import os
import shutil
import time

import psutil


def training_workers():
    """The Ray Train worker processes below this test."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)
    return result


def kill_one_worker(storage, kept, killed):
    """After the first checkpoint kill a worker, then keep a copy of what a driver that dies now would leave."""
    wait_until(lambda: list(storage.glob("*/checkpoint_manager_snapshot.json")))
    workers = training_workers()
    killed.append(len(workers))
    os.kill(workers[-1].pid, 9)
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    shutil.copytree(storage, kept)
