"""Deploys a model into a versioned model repository, as Triton and TensorFlow Serving load it:

    <MODEL_REPOSITORY>/<DEPLOYMENT_KEY>/<PREFIX>/<MODEL_NAME>/<1, 2, 3 ...>/

Its environment variables; all but the last are required. Exits with 2 if one is missing, with 1 for
any other failure.

    DEPLOYMENT_KEY, PREFIX, MODEL_NAME
                         letters, digits, '.', '_' and '-', beginning with a letter or digit
    MODEL_DIR            the model; relative to the working folder, a task's copy of the tasks
                         folder. Links to targets inside it are followed; links to targets outside
                         are an error.
    MODEL_REPOSITORY     an absolute path, since a task's own folder is removed with its worker. It
                         must exist (a missing mount must not pass for one), on a POSIX file system.
    MODEL_API_BASE_URL   http(s), http://127.0.0.1:8000 by default. The URLs printed at the end have
                         the layout of the repository, so that any static file server can serve
                         `meta`. api: <base>/<deployment>/<prefix>/<model>/, version: <api><n>/,
                         meta: <version>metadata.json

Any number of deployers may run at once, on any number of hosts. Each copies into a hidden
`.staging-...` folder beside the versions, which both servers ignore, and publishes it by renaming
it to the highest number plus one. The rename claims the number: it fails if the target is a folder
that is not empty, and a version never is, since it has its metadata.json. So each number has one
owner; a deployer whose number is taken tries the next. Gaps are not filled. A killed deployer
leaves its staging folder; a later one removes it after a day without a write to it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import uuid
from datetime import datetime, timezone
from types import FrameType
from typing import Any, Mapping, Optional

SEGMENTS = ("DEPLOYMENT_KEY", "PREFIX", "MODEL_NAME")
METADATA = "metadata.json"
STAGING = ".staging-"
ABANDONED_AFTER_SECONDS = 24 * 60 * 60
PROGRESS_SECONDS = 5
CHUNK_BYTES = 4 * 1024 * 1024
# Errors of rename if the number is taken: by a folder (POSIX allows either), or by a file.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class Refused(Exception):
    """The model is not deployed; its message is all that is printed."""


def base_url(env: Mapping[str, str]) -> str:
    return (env.get("MODEL_API_BASE_URL", "").strip() or "http://127.0.0.1:8000").rstrip("/")


def check_settings(env: Mapping[str, str]) -> None:
    wrong = [name for name in SEGMENTS if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", env[name])]
    if wrong:
        raise Refused(f"not letters, digits, '.', '_' and '-', beginning with a letter or digit: {', '.join(wrong)}")
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w.~%/-]*)?", base_url(env), re.ASCII):
        # Not printed: it may contain a password.
        raise Refused("MODEL_API_BASE_URL is not an http or https URL without user, query and fragment")
    if not os.path.isabs(env["MODEL_REPOSITORY"]):
        raise Refused("MODEL_REPOSITORY is not an absolute path")
    for name in ("MODEL_DIR", "MODEL_REPOSITORY"):
        if not os.path.isdir(env[name]):
            problem = "is not a folder" if os.path.exists(env[name]) else "does not exist"
            raise Refused(f"{name} {problem}: {env[name]!r}")


def list_model(root: str) -> tuple[list[str], list[str]]:
    """Returns the paths of the model's folders (empty ones too), parents first, and files."""
    folders: list[str] = []
    files: list[str] = []

    def visit(folder: str, trail: frozenset[str]) -> None:
        for name in sorted(os.listdir(os.path.join(root, folder))):
            path = os.path.join(folder, name)
            real = os.path.realpath(os.path.join(root, path))
            if not name.isprintable():
                raise Refused(f"MODEL_DIR holds a name that cannot be printed: {path!r}")
            if os.path.commonpath([real, root]) != root:
                raise Refused(f"MODEL_DIR holds a link that leaves it: {path}")
            if real in trail:
                raise Refused(f"MODEL_DIR holds a link to a folder that it lies in: {path}")
            if os.path.isdir(real):
                folders.append(path)
                visit(path, trail | {real})
            elif os.path.isfile(real):
                files.append(path)
            else:
                raise Refused(f"MODEL_DIR holds what is neither a file nor a folder: {path}")

    visit("", frozenset([root]))
    if not files:
        raise Refused(f"MODEL_DIR holds no file: {root!r}")
    if METADATA in files or METADATA in folders:
        raise Refused(f"MODEL_DIR holds a {METADATA}, which the deployer writes itself")
    return folders, files


def sync_folder(path: str) -> None:
    """Syncs a folder: otherwise a power failure may lose names in it, even of synced files."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_abandoned(model_folder: str, own: str) -> None:
    """
    Removes staging folders of killed deployers. Renames each first, so that a deployer that wakes up
    after a day cannot publish it half empty. Ages are relative to our own new folder: hosts' clocks
    may differ.
    """
    oldest = os.stat(own).st_mtime - ABANDONED_AFTER_SECONDS
    for name in os.listdir(model_folder):
        path, claimed = (os.path.join(model_folder, each) for each in (name, STAGING + uuid.uuid4().hex))
        try:
            if name.startswith(STAGING) and os.stat(path).st_mtime < oldest:
                os.rename(path, claimed)
                shutil.rmtree(claimed)
                print(f"removed {name}, which a deployer left behind")
        except OSError:
            pass  # another deployer was faster, or it is not ours to remove


def copy_model(root: str, staging: str, folders: list[str], files: list[str]) -> list[dict[str, Any]]:
    """Copies and syncs. Sizes and checksums are of the bytes written, even if a source changes."""
    for folder in folders:
        os.mkdir(os.path.join(staging, folder))
    copied: list[dict[str, Any]] = []
    said_at = time.monotonic()
    for path in files:
        digest, size = hashlib.sha256(), 0
        with open(os.path.join(root, path), "rb") as source, open(os.path.join(staging, path), "xb") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                os.utime(staging)  # the sign of life that remove_abandoned checks
                if time.monotonic() - said_at >= PROGRESS_SECONDS:
                    said_at = time.monotonic()
                    print(f"copying {path}: {size} bytes so far, {len(copied)} of {len(files)} files done")
            target.flush()
            os.fsync(target.fileno())
        copied.append({"path": path, "size": size, "sha256": digest.hexdigest()})
    for folder in reversed(folders):
        sync_folder(os.path.join(staging, folder))
    return copied


def publish(staging: str, model_folder: str, metadata: dict[str, Any]) -> int:
    """Renames `staging` to the next number, which goes into the metadata, and returns it."""
    while True:
        taken = [int(name) for name in os.listdir(model_folder) if re.fullmatch("[0-9]+", name)]
        version = max(taken, default=0) + 1
        with open(os.path.join(staging, METADATA), "w", encoding="utf-8") as file:
            json.dump({"version": version, **metadata}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(staging)
        try:
            os.rename(staging, os.path.join(model_folder, str(version)))
        except OSError as err:
            if err.errno not in TAKEN:
                raise
            print(f"version {version} was taken meanwhile")
            continue
        sync_folder(model_folder)
        return version


def deploy(env: Mapping[str, str]) -> None:
    check_settings(env)
    root, model_folder = os.path.realpath(env["MODEL_DIR"]), os.path.realpath(env["MODEL_REPOSITORY"])
    if os.path.commonpath([model_folder, root]) == root:
        raise Refused("MODEL_REPOSITORY lies inside MODEL_DIR, and would be copied into itself")
    folders, files = list_model(root)
    for name in SEGMENTS:
        parent, model_folder = model_folder, os.path.join(model_folder, env[name])
        os.makedirs(model_folder, exist_ok=True)
        sync_folder(parent)
    staging = os.path.join(model_folder, STAGING + uuid.uuid4().hex)
    try:
        os.mkdir(staging)
        remove_abandoned(model_folder, staging)
        print(f"copying {len(files)} files from {root} to {model_folder}")
        copied = copy_model(root, staging, folders, files)
        metadata = {
            "model": env["MODEL_NAME"],
            "deployment": env["DEPLOYMENT_KEY"],
            "prefix": env["PREFIX"],
            "created_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "task_id": env.get("TASK_ID"),
            "total_size": sum(file["size"] for file in copied),
            "files": copied,
        }
        version = publish(staging, model_folder, metadata)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # a published folder no longer has this name
    print(f"published version {version}: {len(copied)} files, {metadata['total_size']} bytes")
    api = "/".join([base_url(env), *(env[name] for name in SEGMENTS), ""])
    print(f"api: {api}\nversion: {api}{version}/\nmeta: {api}{version}/{METADATA}")


def stop(number: int, _frame: Optional[FrameType]) -> None:
    """Exits with cleanup, which a second signal must not interrupt."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that progress shows at once
    missing = [name for name in (*SEGMENTS, "MODEL_DIR", "MODEL_REPOSITORY") if not os.environ.get(name, "").strip()]
    if missing:
        print(f"cannot deploy: set {', '.join(missing)} in env_variables", file=sys.stderr)
        return 2
    try:
        deploy(os.environ)
    except (Refused, OSError) as err:
        print(f"cannot deploy: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
