"""A judge behind an OpenAI-style endpoint on this machine. It gives everything the score 0."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        verdict = {"nonce": re.search(r"Nonce: (\w+)", asked)[1], "score": 0, "reason": "a refusal"}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": json.dumps(verdict)},
            "finish_reason": "stop",
        }
        data = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Prints nothing."""


def start_judge(port: int):
    """Serves until the process ends."""
    threading.Thread(target=ThreadingHTTPServer(("127.0.0.1", port), _Handler).serve_forever, daemon=True).start()
