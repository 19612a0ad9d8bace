"""Two ways to run a task of the task runner from Airflow 2.10.5+ or 3; README.md beside this file has the set-up.

- name >> submit >> wait >> cancel: operators of the HTTP provider alone. While it waits it takes no worker slot.
- run_safe: one @task with the helper module. Less to read; it takes a worker slot while it waits.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta
from pathlib import Path

from airflow.providers.http.hooks.http import HttpHook
from airflow.providers.http.operators.http import HttpOperator
from airflow.providers.http.sensors.http import HttpSensor

try:
    from airflow.sdk import DAG, task  # Airflow 3
except ImportError:
    from airflow.decorators import task
    from airflow.models.dag import DAG
try:
    from airflow.sdk.exceptions import AirflowFailException
except ImportError:  # Airflow 2, and the first versions of 3
    from airflow.exceptions import AirflowFailException

from task_runner_client import (
    LOG_TAIL_CHARACTERS,
    TaskRunner,
    run_task_safe,
    task_id_for,
    worker_config_from_file,
)

CONNECTION = "task_runner"
HERE = Path(__file__).parent
TIMEOUT = timedelta(hours=6)
TASK_ID = "{{ ti.xcom_pull(task_ids='name') }}"
TASK_PATH = "tasks/{{ ti.xcom_pull(task_ids='name') | urlencode }}"
# The checks below judge the status. Without this the hook would call every refusal an outage, and it would be repeated.
JUDGED_BELOW = {"check_response": False}

log = logging.getLogger(__name__)


def is_accepted(response, also: tuple = ()) -> bool:
    """False while the service is busy or fails: what asked is repeated. A refusal fails at once, with its reason."""
    if response.status_code < 300 or response.status_code in also:
        return True
    if response.status_code == 429 or response.status_code >= 500:
        return False
    raise AirflowFailException(f"the service refused it with {response.status_code}: {response.text[:2000]}")


def is_cancelled(response) -> bool:
    """A task that was never accepted needs no cancelling."""
    return is_accepted(response, also=(404,))


def has_succeeded(response) -> bool:
    if not is_accepted(response):
        return False
    record = response.json()
    if record["status"] not in ("succeeded", "failed", "cancelled"):
        return False
    show_end_of_log(record["task_id"])
    if record["status"] != "succeeded":
        # Not to be tried again by the sensor: what has ended stays so.
        outcome = f"{record['status']}: {record['reason']}, {record['message']}"
        raise AirflowFailException(f"task {record['task_id']} {outcome}")
    return True


def show_end_of_log(task_id: str) -> None:
    try:
        log.info("log of task %s:\n%s", task_id, client().logs(task_id)[-LOG_TAIL_CHARACTERS:])
    except Exception as err:
        # The outcome counts, and the service keeps the log.
        log.warning("the log of task %s could not be had: %s", task_id, err)


def client() -> TaskRunner:
    hook = HttpHook(http_conn_id=CONNECTION)
    token = hook.get_conn().headers.get("Authorization", "").split(" ")[-1]
    return TaskRunner(hook.base_url, token)


with DAG(
    dag_id="run_task_safe",
    schedule=None,
    start_date=datetime(2024, 1, 1),
    catchup=False,
    # Some fifteen minutes in all: every request may be repeated, and a service that is away comes back.
    default_args={
        "retries": 10,
        "retry_delay": timedelta(seconds=10),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=2),
    },
) as dag:

    # The id has a task of its own, which ends before anything is sent: whatever becomes of `submit`, also when the run is
    # marked failed while it is at work, `cancel` knows what to cancel. Clearing the task in Airflow changes max_tries,
    # and so the id: it runs anew.
    @task
    def name(ti=None) -> str:
        return task_id_for(ti.dag_id, ti.run_id, ti.task_id, ti.max_tries)

    submit = HttpOperator(
        task_id="submit",
        http_conn_id=CONNECTION,
        endpoint="task-runner",
        method="POST",
        headers={"Content-Type": "application/json"},
        data=json.dumps(
            {
                # A retry posts the same id again, which starts nothing new.
                "task_id": TASK_ID,
                "task_file_name": "hello.py",
                "worker_config": worker_config_from_file(HERE / "default_worker.json"),
                "timeout_seconds": int(TIMEOUT.total_seconds()),
            }
        ),
        extra_options=JUDGED_BELOW,
        response_check=is_accepted,
    )

    # Not deferrable=True: the sensor's trigger cannot look into a body, it fires at the first answer that is not a 404.
    # So with a response_check HttpSensor ignores `deferrable` and pokes, in a worker slot
    # (https://github.com/apache/airflow/issues/40209). mode="reschedule" gives the slot back between looks.
    wait = HttpSensor(
        task_id="wait",
        http_conn_id=CONNECTION,
        endpoint=TASK_PATH,
        method="GET",
        extra_options=JUDGED_BELOW,
        response_check=has_succeeded,
        # A service that cannot be reached is asked again until the timeout: its tasks run on meanwhile.
        silent_fail=True,
        deferrable=False,
        mode="reschedule",
        poke_interval=15,
        timeout=TIMEOUT.total_seconds(),
    )

    # A teardown runs whatever became of the others, also when the DAG run is marked failed by hand. A task that has ended
    # is not touched by it.
    cancel = HttpOperator(
        task_id="cancel",
        http_conn_id=CONNECTION,
        endpoint=TASK_PATH + "/cancel",
        method="POST",
        extra_options=JUDGED_BELOW,
        response_check=is_cancelled,
    )

    named = name()
    named >> submit >> wait >> cancel.as_teardown(setups=named)

    # The helper repeats what is safe to repeat. You decide with `retries` whether the script may run twice.
    # multiple_outputs would push each field of the record, and Airflow 3.0 cannot push those that are None.
    @task(retries=0, execution_timeout=TIMEOUT, multiple_outputs=False)
    def run_safe(ti=None) -> dict:
        runner = client()

        def id_of(try_number: int) -> str:
            return task_id_for(ti.dag_id, ti.run_id, ti.task_id, try_number, ti.map_index)

        # An earlier try that was killed outright could not cancel its task.
        for earlier in range(1, ti.try_number):
            runner.cancel(id_of(earlier))
        request = {
            "task_id": id_of(ti.try_number),
            "task_file_name": "hello.py",
            "worker_config": worker_config_from_file(HERE / "default_worker.json"),
            "timeout_seconds": int(TIMEOUT.total_seconds()),
        }
        return run_task_safe(runner, request)

    run_safe()
