"""Two ways to run a task of the task runner from Airflow 2.9+ or 3; README.md beside this file has the set-up.

- submit >> wait >> cancel: operators of the HTTP provider alone. While it waits it takes no worker slot.
- deploy: one @task with the helper module. Less to read; it takes a worker slot while it waits.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

from airflow.exceptions import AirflowFailException
from airflow.providers.http.hooks.http import HttpHook
from airflow.providers.http.operators.http import HttpOperator
from airflow.providers.http.sensors.http import HttpSensor

try:
    from airflow.sdk import DAG, task  # Airflow 3
except ImportError:
    from airflow.decorators import task
    from airflow.models.dag import DAG

from task_runner import TaskRunner, run_task_safe, task_id_for, worker_config_from_file

CONNECTION = "task_runner"
HERE = Path(__file__).parent
TIMEOUT = timedelta(hours=6)
# The id that `submit` got the answer for.
TASK_PATH = "tasks/{{ ti.xcom_pull(task_ids='submit') | urlencode }}"


def has_succeeded(response) -> bool:
    record = response.json()
    if record["status"] in ("failed", "cancelled"):
        # Not to be tried again by the sensor: what has ended stays so.
        outcome = f"{record['status']}: {record['reason']}, {record['message']}"
        raise AirflowFailException(f"task {record['task_id']} {outcome}")
    return record["status"] == "succeeded"


with DAG(
    dag_id="run_task_safe",
    schedule=None,
    start_date=datetime(2024, 1, 1),
    catchup=False,
    default_args={"retries": 5, "retry_delay": timedelta(seconds=20)},
    user_defined_macros={"task_id_for": task_id_for},
) as dag:
    submit = HttpOperator(
        task_id="submit",
        http_conn_id=CONNECTION,
        endpoint="task-runner",
        method="POST",
        headers={"Content-Type": "application/json"},
        data=json.dumps(
            {
                # max_tries instead of try_number: a retry of this operator posts the same id again, which starts
                # nothing new, and only clearing the task in Airflow changes max_tries, which runs it anew.
                "task_id": "{{ task_id_for(dag.dag_id, run_id, task.task_id, ti.max_tries) }}",
                "task_file_name": "hello.py",
                "worker_config": worker_config_from_file(HERE / "default_worker.json"),
                "timeout_seconds": int(TIMEOUT.total_seconds()),
            }
        ),
        response_filter=lambda response: response.json()["task_id"],
    )

    # Not deferrable=True: the sensor's trigger cannot look into a body, it fires at the first answer that is not a 404.
    # So with a response_check HttpSensor ignores `deferrable` and pokes, in a worker slot
    # (https://github.com/apache/airflow/issues/40209). mode="reschedule" gives the slot back between looks.
    wait = HttpSensor(
        task_id="wait",
        http_conn_id=CONNECTION,
        endpoint=TASK_PATH,
        method="GET",
        response_check=has_succeeded,
        response_error_codes_allowlist=["429", "500", "502", "503", "504"],
        deferrable=False,
        mode="reschedule",
        poke_interval=15,
        timeout=TIMEOUT.total_seconds(),
    )

    # A teardown runs whatever became of `wait`, also when the DAG run is marked failed by hand. A task that has ended
    # is not touched by it.
    cancel = HttpOperator(
        task_id="cancel",
        http_conn_id=CONNECTION,
        endpoint=TASK_PATH + "/cancel",
        method="POST",
    )

    submit >> wait >> cancel.as_teardown(setups=submit)

    # The helper repeats what is safe to repeat. Whether the script may run twice is for you to say, with `retries`.
    @task(retries=0, execution_timeout=TIMEOUT)
    def deploy(ti=None) -> dict:
        hook = HttpHook(http_conn_id=CONNECTION)
        token = hook.get_conn().headers.get("Authorization", "").split(" ")[-1]
        client = TaskRunner(hook.base_url, token)

        def id_of(try_number: int) -> str:
            return task_id_for(ti.dag_id, ti.run_id, ti.task_id, try_number, ti.map_index)

        # An earlier try that was killed outright could not cancel its task.
        for earlier in range(1, ti.try_number):
            client.cancel(id_of(earlier))
        request = {
            "task_id": id_of(ti.try_number),
            "task_file_name": "deployer_task.py",
            "worker_config": worker_config_from_file(HERE / "deploy_worker.json"),
            "timeout_seconds": int(TIMEOUT.total_seconds()),
        }
        return run_task_safe(client, request)

    deploy()
