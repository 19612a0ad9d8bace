#!/usr/bin/env python3
"""Runs a task, waits for its callback, verifies it, prints the log, and exits by the outcome.

    TASK_RUNNER_URL=… TASK_RUNNER_TOKEN=… CALLBACK_SIGNING_SECRET=whsec_… \\
        python3 run_with_callback.py parameters.sh MY_FIRST_PARAM=VALUE1 MY_SECOND_PARAM=123

CALLBACK_SIGNING_SECRET is one of the service's CALLBACK_SIGNING_SECRETS. CALLBACK_HOST (127.0.0.1) is where the service
reaches this program, and CALLBACK_PORT (any free one) its port. Exit code: 0 succeeded, 1 failed, 2 no callback,
3 refused: a wrong token, an unknown file, an invalid field; 4 the service cannot be reached.
"""

import hmac
import os
import queue
import secrets
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from task_runner_client import RequestRefused, TaskRunner, TaskRunnerError, verify

BODY_BYTES_MAX = 64 * 1024 * 1024
WAIT_SECONDS = 24 * 3600


def start_receiver(
    host: str, port: int, token: str, secret: str, callbacks: "queue.Queue[dict[str, Any]]"
) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", "0"))
            if length > BODY_BYTES_MAX:
                return self.answer(413)
            body = self.rfile.read(length)
            bearer = self.headers.get("authorization", "")
            if not hmac.compare_digest(bearer.encode(), f"Bearer {token}".encode()):
                return self.answer(401)
            try:
                callback = verify(self.headers, body, secret)
            except ValueError as err:
                print(f"callback refused: {err}", file=sys.stderr)
                return self.answer(401)
            # Answered before it is handled: an attempt that takes long is repeated.
            self.answer(204)
            callbacks.put(callback)

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    callbacks: "queue.Queue[dict[str, Any]]" = queue.Queue()
    token = secrets.token_urlsafe(32)
    port = int(os.environ.get("CALLBACK_PORT", "0"))
    host = os.environ.get("CALLBACK_HOST", "127.0.0.1")
    # The service may know this machine by a name or address that it does not know itself by.
    listen_on = host if host == "127.0.0.1" else ""
    receiver = start_receiver(listen_on, port, token, os.environ["CALLBACK_SIGNING_SECRET"], callbacks)

    task_id = f"python-{uuid.uuid4()}"
    client = TaskRunner(os.environ["TASK_RUNNER_URL"], os.environ.get("TASK_RUNNER_TOKEN"), retry_seconds=60)
    try:
        client.submit(
            {
                "task_id": task_id,
                "task_file_name": sys.argv[1],
                "worker_config": {"env_variables": dict(each.split("=", 1) for each in sys.argv[2:])},
                "callback_url": f"http://{host}:{receiver.server_port}/callback",
                "callback_url_token": token,
            }
        )
    except RequestRefused as err:
        print(f"the task was refused: {err}", file=sys.stderr)
        return 3
    except TaskRunnerError as err:
        print(f"the task was not accepted: {err}", file=sys.stderr)
        return 4
    try:
        # One task, one callback; who receives many ignores a webhook-id seen before.
        callback = callbacks.get(timeout=WAIT_SECONDS)
    except queue.Empty:
        print(f"task {task_id}: no callback came", file=sys.stderr)
        return 2
    sys.stdout.write(callback["logs"])
    return 0 if callback["success"] else 1


if __name__ == "__main__":
    sys.exit(main())
