"""Reads a callback and a task with what datamodel-codegen made in ./models.py, a new field in each included."""

import json
import sys

from models import Task, TaskRunnerCallbackRequest, TaskStatus

given = json.load(sys.stdin)
for each in given.values():
    each["a_field_of_a_newer_service"] = {"at": 1}
callback = TaskRunnerCallbackRequest.model_validate(given["callback"])
task = Task.model_validate(given["task"])
assert task.status is TaskStatus.succeeded
json.dump({"task_id": callback.task_id, "finished": task.finished_at.isoformat()}, sys.stdout)
