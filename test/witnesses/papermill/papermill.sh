#!/usr/bin/env bash
# Runs notebooks with the real papermill by the stand-in of examples/practicus, as tasks of the real
# service. `papermill.sh PYTHON`: one that has papermill.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=$1
folder=$(mktemp -d)
service=
clean_up() {
  [ -z "$service" ] || { kill "$service" && wait "$service" || true; }
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 143' TERM

tasks=$folder/tasks results=$folder/results
cp -r examples/practicus/tasks "$tasks"
mkdir "$results"
notebook() { # notebook NAME CODE: its first cell has the parameters
  cat >"$tasks/$1.ipynb" <<JSON
{
  "cells": [
    {"cell_type": "code", "execution_count": null, "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [], "source": ["count = 1"]},
    {"cell_type": "code", "execution_count": null, "id": "b", "metadata": {}, "outputs": [], "source": ["$2"]}
  ],
  "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
  "nbformat": 4,
  "nbformat_minor": 5
}
JSON
}
notebook report "print('count is', count * 2)"
notebook fails "1 / (count - 21)"
cat >"$tasks/succeeds.py" <<PYTHON
import practicuscore as prt
assert prt.notebooks.execute_notebook("report", parameters={"count": 21}, output_path="$results/report.ipynb")
assert not prt.notebooks.execute_notebook("fails", {"count": 21}, failed_output_path="$results/failed.ipynb")
PYTHON
cat >"$tasks/raises.py" <<PYTHON
import practicuscore as prt
prt.notebooks.execute_notebook("fails", {"count": 21}, raise_on_failure=True)
PYTHON

export TASK_RUNNER_TOKEN=token-of-the-papermill-witness
env -i PATH="$PATH" PORT=0 API_TOKENS=$TASK_RUNNER_TOKEN DATA_DIR="$folder/data" TASKS_DIR="$tasks" \
  PYTHON_COMMAND="$python" node_modules/.bin/node src/main.ts >"$folder/service.log" 2>&1 &
service=$!
until TASK_RUNNER_URL=$(sed -n 's/.*"address":"\([^"]*\)".*/\1/p' "$folder/service.log") && [ -n "$TASK_RUNNER_URL" ]; do
  kill -0 "$service" || { cat "$folder/service.log" >&2; exit 1; }
  sleep 0.1
done
export TASK_RUNNER_URL

wrong() {
  echo "FAILED: $1" >&2
  tail -n 1000 "$folder/service.log" "$folder"/*.log "$results"/* >&2
  exit 1
}
run() { # run NAME EXIT_CODE
  local code=0
  examples/ci/run-task.sh "$1" "$1.py" >"$folder/$1.log" 2>&1 || code=$?
  [ "$code" = "$2" ] || wrong "$1.py exits with $code instead of $2"
}
has() { grep -q -- "$2" "$1" || wrong "$1 does not have: $2"; }

run succeeds 0
has "$results/report.ipynb" 'count is 42'
has "$results/failed.ipynb" 'ZeroDivisionError'
has "$folder/succeeds.log" 'INFO the notebook report.ipynb succeeded'
has "$folder/succeeds.log" 'ERROR the notebook fails.ipynb failed'
echo "notebooks succeed and fail: $SECONDS s"
run raises 1
has "$folder/raises.log" 'PapermillExecutionError'
echo "an error is raised where that is asked for: $SECONDS s"
