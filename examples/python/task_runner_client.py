"""A client of the task runner in one file, for any Python program or Airflow DAG. Standard library only, Python 3.8+.

    client = TaskRunner("https://task-runner.example.com", token)
    task = run_task_safe(client, {"task_id": "nightly-1", "task_file_name": "hello.py", "worker_config": {}})

Safe: when the caller stops waiting, for whatever reason, the task is cancelled, so that no worker is left behind.

    for text in client.follow("nightly-1"):   # the log as it comes, until the task has ended
        print(text, end="")
    callback = verify(headers, body, secret)  # in a receiver
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import logging
import re
import signal
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Iterator, Mapping, Optional

log = logging.getLogger(__name__)

TASK_ID_LENGTH_MAX = 255
RETRIED_STATUSES = (429, 500, 502, 503, 504)
RETRY_WAIT_SECONDS, RETRY_WAIT_SECONDS_MAX = 0.5, 60.0
POLL_SECONDS, POLL_SECONDS_MAX = 0.5, 15.0
CANCEL_RETRY_SECONDS = 20
LOG_TAIL_CHARACTERS = 4000
# A stream is silent for 20 seconds at most.
STREAM_SECONDS = 60
TOLERANCE_SECONDS = 300


class TaskRunnerError(Exception):
    """The service could not be reached, or went on answering with errors, for `retry_seconds`."""


class RequestRefused(TaskRunnerError):
    """The service refuses the request, and would again: a wrong token, an unknown file, an invalid field."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class WaitTimeout(TaskRunnerError):
    """The task had not ended in time."""


class TaskFailed(Exception):
    """The task has ended, and not as `succeeded`. `task` is its record, `log_tail` the end of its log."""

    def __init__(self, task: dict[str, Any], log_tail: str) -> None:
        parts = [f"task {task['task_id']} {task['status']}: {task['reason']}", task["message"], log_tail]
        super().__init__("\n".join(part for part in parts if part))
        self.task = task
        self.reason = task["reason"]
        self.log_tail = log_tail


class TaskRunner:
    """The service at `url` (with its BASE_PATH, if any). A call is repeated for `retry_seconds` while the service
    cannot be reached or is busy; every call may be: the same request under the same task_id starts nothing new."""

    def __init__(self, url: str, token: Optional[str] = None, retry_seconds: float = 300) -> None:
        self.url = url.rstrip("/")
        self.retry_seconds = retry_seconds
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def submit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns once the task is stored and will run."""
        return json.loads(self._call("POST", "/task-runner", request))

    def get_task(self, task_id: str) -> dict[str, Any]:
        return json.loads(self._call("GET", _task_path(task_id)))

    def logs(self, task_id: str) -> str:
        """The last 5 MB."""
        return self._call("GET", f"{_task_path(task_id)}/logs").decode(errors="replace")

    def follow(self, task_id: str) -> Iterator[str]:
        """The log as it comes, until the task has ended. Goes on after a break where it was."""
        seen, deadline = "", time.monotonic() + self.retry_seconds
        while True:
            headers = {**self._headers, **({"Last-Event-ID": seen} if seen else {})}
            request = urllib.request.Request(f"{self.url}{_task_path(task_id)}/logs?follow=true", headers=headers)
            try:
                with _opener.open(request, timeout=STREAM_SECONDS) as response:
                    for event in _events(response):
                        if event.get("event") == "end":
                            return
                        yield event["data"]
                        # Only now: whoever was given it has it.
                        seen = event.get("id", seen)
                        deadline = time.monotonic() + self.retry_seconds
            except urllib.error.HTTPError as err:
                if err.code not in RETRIED_STATUSES:
                    raise RequestRefused(err.code, _message(err)) from None
            except (OSError, http.client.HTTPException) as err:
                log.warning("the log of %s broke off: %s", task_id, err)
            if time.monotonic() > deadline:
                raise TaskRunnerError(f"the log of {task_id} cannot be read")
            time.sleep(RETRY_WAIT_SECONDS)

    def cancel(self, task_id: str) -> None:
        """A task that has ended stays as it is; one that was never accepted is no error."""
        try:
            self._call("POST", f"{_task_path(task_id)}/cancel", retry_seconds=CANCEL_RETRY_SECONDS)
        except RequestRefused as err:
            if err.status != 404:
                raise

    def wait_for_task(self, task_id: str, timeout_seconds: Optional[float] = None) -> dict[str, Any]:
        """The record of the task once it has succeeded. Raises TaskFailed, or WaitTimeout: then it runs on."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        pause = POLL_SECONDS
        while True:
            task = self.get_task(task_id)
            if task["status"] == "succeeded":
                return task
            if task["status"] in ("failed", "cancelled"):
                raise TaskFailed(task, self.logs(task_id)[-LOG_TAIL_CHARACTERS:])
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"task {task_id} is still {task['status']} after {timeout_seconds} s")
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, POLL_SECONDS_MAX)

    def _call(
        self, method: str, path: str, body: Any = None, retry_seconds: Optional[float] = None
    ) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({} if data is None else {"Content-Type": "application/json"})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        deadline = time.monotonic() + (self.retry_seconds if retry_seconds is None else retry_seconds)
        pause = RETRY_WAIT_SECONDS
        while True:
            asked = 0.0
            try:
                with _opener.open(request, timeout=60) as response:
                    return response.read()
            except urllib.error.HTTPError as err:
                problem, asked = _message(err), _retry_after(err)
                if err.code not in RETRIED_STATUSES:
                    raise RequestRefused(err.code, problem) from None
            except (OSError, http.client.HTTPException) as err:
                problem = str(err) or type(err).__name__
            wait = max(pause, min(asked, RETRY_WAIT_SECONDS_MAX))
            if time.monotonic() + wait > deadline:
                raise TaskRunnerError(f"{method} {self.url}{path}: {problem}")
            log.warning("%s %s: %s; trying again in %.1f s", method, path, problem, wait)
            time.sleep(wait)
            pause = min(pause * 2, RETRY_WAIT_SECONDS_MAX)


def run_task_safe(
    client: TaskRunner, request: dict[str, Any], timeout_seconds: Optional[float] = None
) -> dict[str, Any]:
    """Submits, waits, and returns the record of the task. Raises TaskFailed when it does not succeed; on any other
    exception (a timeout, an interruption, SIGTERM) cancels it first."""
    with _sigterm_raises():
        try:
            client.submit(request)
            return client.wait_for_task(request["task_id"], timeout_seconds)
        except (TaskFailed, RequestRefused):
            # It has ended; or it was not accepted, and what runs under its id (409) is not ours to cancel.
            raise
        except BaseException:
            try:
                client.cancel(request["task_id"])
            except TaskRunnerError as err:
                log.error("task %s could not be cancelled: %s", request["task_id"], err)
            raise


def worker_config_from_file(path: Any) -> dict[str, Any]:
    """A `worker_config` from a file as the Practicus SDK writes it."""
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return worker_config_from_params(config)


def worker_config_from_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """A `worker_config` from the params of a DAG run, as the Practicus SDK's form has them: null, "" and "None" stand for
    absent, and names of secrets are text with blanks between them."""
    config = {name: value for name, value in params.items() if value not in (None, "", "None")}
    for name in ("personal_secrets", "shared_secrets"):
        if isinstance(config.get(name), str):
            config[name] = config[name].split()
    # Of how the SDK shows a run, and of a virtual environment that its images have.
    for name in ("capture_task_output", "python_venv_name"):
        config.pop(name, None)
    return config


def task_id_for(dag_id: str, run_id: str, task_id: str, try_number: int, map_index: int = -1) -> str:
    """A readable id, valid and of its own for each try of each (mapped) Airflow task, however long the names are."""
    names = [dag_id, task_id, run_id, str(map_index), str(try_number)]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._:+~-]", "_", ".".join(names))
    return f"{readable[:TASK_ID_LENGTH_MAX - len(digest) - 1]}-{digest}"


def verify(headers: Mapping[str, str], body: bytes, secret: str) -> dict[str, Any]:
    """The callback that `body` holds, byte for byte as it came. Raises ValueError unless it was signed with `secret`
    (`whsec_…`) in the last five minutes (Standard Webhooks). `headers` may be in any case."""
    named = {name.lower(): value for name, value in headers.items()}
    try:
        webhook_id, timestamp = named["webhook-id"], named["webhook-timestamp"]
        given = named["webhook-signature"].split(" ")
    except KeyError:
        raise ValueError("it is not signed") from None
    if not timestamp.isdigit() or abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
        raise ValueError("its timestamp is more than five minutes away")
    key = base64.b64decode(secret[len("whsec_") :] if secret.startswith("whsec_") else secret)
    digest = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    expected = b"v1," + base64.b64encode(digest)
    # More than one while the service's secrets are rotated.
    if not any(hmac.compare_digest(expected, each.encode()) for each in given):
        raise ValueError("no signature matches")
    return json.loads(body)


def _events(response: Any) -> Iterator[dict[str, str]]:
    """Server-Sent Events (HTML Standard, section 9.2.6), as the service writes them."""
    event: dict[str, str] = {}
    for raw in response:
        line = raw.decode().rstrip("\n")
        name, _, value = line.partition(": ")
        if line == "":
            if event:
                yield event
            event = {}
        elif name == "data":
            event["data"] = f"{event['data']}\n{value}" if "data" in event else value
        elif name in ("id", "event"):
            event[name] = value


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the token on to wherever a redirect leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Airflow ends a task with SIGTERM. Airflow 3 raises nothing in the task's code then, and kills it 5 s later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, _: Any) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _task_path(task_id: str) -> str:
    return f"/tasks/{urllib.parse.quote(task_id, safe='')}"


def _message(err: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(err.read())["message"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return err.reason


def _retry_after(err: urllib.error.HTTPError) -> float:
    value = err.headers.get("Retry-After", "0")
    try:
        return float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
