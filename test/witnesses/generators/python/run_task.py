"""Runs a task with what openapi-python-client made in ./generated, and prints what came of it."""

import json
import sys
import time

from generated import AuthenticatedClient
from generated.api.run import run_task
from generated.api.tasks import get_task, get_task_logs
from generated.models import EnvVariables, TaskRunnerRequest, TaskStatus, WorkerConfig

url, token = sys.argv[1:]
client = AuthenticatedClient(base_url=url, token=token)
variables = EnvVariables.from_dict({"MY_FIRST_PARAM": "from Python", "MY_SECOND_PARAM": 123})
accepted = run_task.sync(
    client=client,
    body=TaskRunnerRequest(
        task_id="python",
        task_file_name="parameters.sh",
        worker_config=WorkerConfig(env_variables=variables),
    ),
)
refused = run_task.sync_detailed(
    client=client,
    body=TaskRunnerRequest(task_id="refused", task_file_name="nothere.sh", worker_config=WorkerConfig()),
)
while True:
    task = get_task.sync("python", client=client)
    if task.status in (TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED):
        break
    time.sleep(0.05)
result = {
    "message": accepted.message,
    "status": task.status,
    "exit_code": task.exit_code,
    "log": get_task_logs.sync("python", client=client),
    "refused": [refused.status_code, refused.parsed.code],
}
json.dump(result, sys.stdout)
