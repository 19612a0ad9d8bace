"""A FastAPI app to compare with: a thread per task, a subprocess per script, nothing stored.

Run it with /usr/bin/python3 and TASKS_DIR in the environment. It logs its address as the service does.
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


# asyncio sets TCP_NODELAY only with the protocol given; without it, answers wait 40 ms for an ACK.
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
listener.bind(("127.0.0.1", 0))
listener.listen(2048)
address = f"http://127.0.0.1:{listener.getsockname()[1]}"
print(json.dumps({"msg": "listening", "address": address}, separators=(",", ":")), flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
