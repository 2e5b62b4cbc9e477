"""Stands in for llama.cpp's server where its client is tested: answers what it is asked, and knows a picture that it
was shown before.

    llama_server.py -m MODEL --port PORT …
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIRST_LOOK_S, TOKEN_S = 0.3, 0.02


class Answers(BaseHTTPRequestHandler):
    shown: set[str] = set()  # noqa: RUF012

    def do_GET(self) -> None:
        self._reply({"media_marker": "<here>"} if self.path == "/props" else {"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(body["prompt"], dict):
            assert "<here>" in body["prompt"]["prompt_string"]
            (picture,) = body["prompt"]["multimodal_data"]
            if picture not in self.shown:
                self.shown.add(picture)
                time.sleep(FIRST_LOOK_S)
        else:
            assert body["ignore_eos"]
            assert body["cache_prompt"]
            time.sleep(TOKEN_S * body["n_predict"])
        self._reply({"tokens_predicted": body["n_predict"]})

    def _reply(self, words: dict[str, object]) -> None:
        text = json.dumps(words).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever()
