"""A real server on loopback that scores pairs in every shape, and misbehaves when it is told to."""

import json
import math
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def logit(query, item):
    """The known answer: words in common and lengths."""
    return 2.0 * len(set(query.split()) & set(item.split())) - 0.37 * len(item.split()) - 0.011 * len(query)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class PairServer(ThreadingHTTPServer):
    """`faults` are called with each POST's handler and body, in turn, until one answers (returns True)."""

    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.bodies, self.headers, self.times = [], [], [], []
        self.at_once, self.most_at_once, self.lock = 0, 0, threading.Lock()
        self.ignores_raw, self.info = False, {"model_id": "tiny", "model_sha": "abc", "model": {"name": "x", "hash": "abc"}}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A connection that the client or a fault has ended."""


@contextmanager
def pair_server():
    server = PairServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return True

    def drop(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        return True

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "tiny", "root": "org/tiny", "max_model_len": 512, "created": time.time()}]})
        else:
            self.answer(200, self.server.info) if self.path == "/info" else self.answer(404, {"error": "no such path"})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            if not any(fault(self, body) for fault in server.faults):
                self.answer(200, self.scores(body))
        finally:
            with server.lock:
                server.at_once -= 1

    def scores(self, body):
        query = body.get("query", body.get("text_1"))
        items = body.get("documents") or body.get("texts") or body.get("text_2")
        logits = [logit(query, item) for item in items]
        is_raw = (body.get("raw_scores") or body.get("use_activation") is False) and not self.server.ignores_raw
        order = np.random.default_rng(0).permutation(len(items)).tolist()
        rows = [(row, logits[row] if is_raw else sigmoid(logits[row])) for row in order]
        if self.path == "/rerank":
            return [{"index": row, "score": score} for row, score in rows]
        if self.path == "/v1/score":
            return {"object": "list", "data": [{"index": row, "object": "score", "score": score} for row, score in rows]}
        return {"results": [{"index": row, "relevance_score": score} for row, score in rows], "meta": {}}
