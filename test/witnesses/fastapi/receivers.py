"""Callback receivers as users of FastAPI write them: `python receivers.py` prints its URL."""

import os
import sys

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from standardwebhooks import Webhook, WebhookVerificationError

app = FastAPI()
received = []


class TaskRunnerCallbackRequest(BaseModel):
    task_name: str
    task_id: str
    success: bool
    logs: str


class TaskRunnerCallbackResponse(BaseModel):
    success: bool
    message: str


def only_our_token(credentials: HTTPAuthorizationCredentials = Depends(HTTPBearer())):
    if credentials.credentials != os.environ["TOKEN"]:
        raise HTTPException(401, "wrong token")


@app.post("/model", response_model=TaskRunnerCallbackResponse)
async def model(body: TaskRunnerCallbackRequest):
    received.append({"path": "/model", **body.model_dump()})
    return TaskRunnerCallbackResponse(success=True, message="ok")


@app.post("/token", dependencies=[Depends(only_our_token)])
async def token(body: TaskRunnerCallbackRequest):
    received.append({"path": "/token", **body.model_dump()})
    return {"success": True, "message": "ok"}


@app.post("/any")
async def any_json(request: Request):
    body = await request.json()
    received.append({"path": "/any", "task_name": body.get("task_name"), **body})
    return {"success": True, "message": "ok"}


@app.post("/signed")
async def signed(request: Request):
    try:
        body = Webhook(os.environ["SIGNING_SECRET"]).verify(await request.body(), dict(request.headers))
    except WebhookVerificationError as err:
        raise HTTPException(400, str(err)) from err
    received.append({"path": "/signed", **body})
    return {"success": True, "message": "ok"}


@app.get("/received")
async def what_came():
    return received


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=0, log_level="info", access_log=False)
