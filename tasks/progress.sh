#!/usr/bin/env bash
# Runs for a minute (STEPS seconds) and prints its progress: a task to follow or cancel.
set -euo pipefail

steps=${STEPS:-60}
for ((step = 1; step <= steps; step++)); do
  echo "step $step of $steps"
  sleep 1
done
echo done
