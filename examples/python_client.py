#!/usr/bin/env python3
"""Runs a task, waits for its callback, verifies it, prints the log, and exits by the outcome. Needs `requests`.

    TASK_RUNNER_URL=… TASK_RUNNER_TOKEN=… CALLBACK_SIGNING_SECRET=whsec_… \\
        python3 python_client.py parameters.sh MY_FIRST_PARAM=VALUE1 MY_SECOND_PARAM=123

CALLBACK_SIGNING_SECRET is one of the service's CALLBACK_SIGNING_SECRETS. CALLBACK_HOST (127.0.0.1) is where the service
reaches this program, and CALLBACK_PORT (any free one) its port. Exit code: 0 succeeded, 1 failed, 2 no callback.
"""

import base64
import hashlib
import hmac
import json
import os
import queue
import secrets
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Mapping

import requests

TOLERANCE_SECONDS = 300
BODY_BYTES_MAX = 64 * 1024 * 1024
WAIT_SECONDS = 24 * 3600


def verify_signature(headers: Mapping[str, str], body: bytes, secret: str) -> None:
    """Raises ValueError unless `body`, byte for byte as it came, was signed with `secret` in the last five minutes
    (Standard Webhooks). `headers` is looked up in lower case."""
    try:
        webhook_id, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
        given = headers["webhook-signature"].split(" ")
    except (KeyError, AttributeError):
        raise ValueError("it is not signed") from None
    if not timestamp.isdigit() or abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
        raise ValueError("its timestamp is more than five minutes away")
    key = base64.b64decode(secret[len("whsec_") :] if secret.startswith("whsec_") else secret)
    digest = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    expected = b"v1," + base64.b64encode(digest)
    # More than one while the service's secrets are rotated.
    if not any(hmac.compare_digest(expected, each.encode()) for each in given):
        raise ValueError("no signature matches")


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
                verify_signature({name.lower(): value for name, value in self.headers.items()}, body, secret)
            except ValueError as err:
                print(f"callback refused: {err}", file=sys.stderr)
                return self.answer(401)
            # Answered before it is handled: an attempt that takes long is repeated.
            self.answer(204)
            callbacks.put(json.loads(body))

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def submit(session: requests.Session, url: str, request: "dict[str, Any]") -> None:
    """Repeated while the service cannot be reached or is busy: the same task_id starts nothing twice."""
    for attempt in range(8):
        problem, asked = "", "0"
        try:
            response = session.post(f"{url}/task-runner", json=request, timeout=60, allow_redirects=False)
            if response.status_code == 200:
                return
            problem = f"{response.status_code} {response.text}"
            if response.status_code not in (429, 500, 502, 503, 504):
                break
            asked = response.headers.get("retry-after", "0")
        except requests.RequestException as err:
            problem = str(err)
        time.sleep(max(0.25 * 2**attempt, min(int(asked), 60) if asked.isdigit() else 0))
    sys.exit(f"the task was not accepted: {problem}")


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

    session = requests.Session()
    if os.environ.get("TASK_RUNNER_TOKEN"):
        session.headers["Authorization"] = f"Bearer {os.environ['TASK_RUNNER_TOKEN']}"
    task_id = f"python-client-{uuid.uuid4()}"
    submit(
        session,
        os.environ["TASK_RUNNER_URL"].rstrip("/"),
        {
            "task_id": task_id,
            "task_file_name": sys.argv[1],
            "worker_config": {"env_variables": dict(each.split("=", 1) for each in sys.argv[2:])},
            "callback_url": f"http://{host}:{receiver.server_port}/callback",
            "callback_url_token": token,
        },
    )
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
