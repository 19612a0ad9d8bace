"""The shape of the old app, to compare with: a thread for each task, a subprocess for each script, no durability.

/usr/bin/python3 fastapi_app.py, with TASKS_DIR in the environment; says where it listens as the service does.
"""

import json
import os
import socket
import subprocess
import threading
from typing import Optional

import requests
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

INTERPRETERS = {".sh": ["/usr/bin/bash"], ".py": ["/usr/bin/python3", "-u"]}
TASKS_DIR = os.environ["TASKS_DIR"]
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "LANG")}

app = FastAPI()


class TaskRequest(BaseModel):
    task_id: str
    task_file_name: str
    worker_config: dict
    callback_url: Optional[str] = None


def run(task: TaskRequest) -> None:
    interpreter = INTERPRETERS[os.path.splitext(task.task_file_name)[1]]
    done = subprocess.run(
        [*interpreter, f"./{task.task_file_name}"],
        cwd=TASKS_DIR,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if task.callback_url:
        outcome = {
            "task_name": task.task_file_name,
            "task_id": task.task_id,
            "success": done.returncode == 0,
            "logs": done.stdout,
        }
        requests.post(task.callback_url, json=outcome, timeout=15)


@app.post("/task-runner")
async def start(task: TaskRequest) -> dict:
    threading.Thread(target=run, args=(task,)).start()
    return {"success": True, "message": "Started Task successfully", "task_id": task.task_id}


# With the protocol named: asyncio sends at once (TCP_NODELAY) on no other, and an answer would wait 40 ms for an acknowledgement.
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
listener.bind(("127.0.0.1", 0))
listener.listen(2048)
address = f"http://127.0.0.1:{listener.getsockname()[1]}"
print(json.dumps({"msg": "listening", "address": address}, separators=(",", ":")), flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
