"""How much memory the processes of a benchmark hold for themselves."""

import threading

import psutil


class OwnMemory:
    """Context: the most memory that any one process named so below this one held for itself (not shared, not mapped files)."""

    def __init__(self, *names):
        self.names, self.peak, self._stop = names, 0, threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    if any(name in " ".join(process.cmdline()) for name in self.names):
                        memory = process.memory_info()
                        self.peak = max(self.peak, memory.rss - memory.shared)
                except psutil.Error:
                    continue
