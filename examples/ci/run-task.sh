#!/bin/sh
# Runs a task on the task runner, prints its log as it comes, and exits by its outcome.
#
#   TASK_RUNNER_URL=… TASK_RUNNER_TOKEN=… run-task.sh TASK_ID FILE [WORKER_JSON_FILE]
#   TASK_RUNNER_URL=… TASK_RUNNER_TOKEN=… run-task.sh --cancel TASK_ID
#
# Exit code: 0 succeeded, 1 failed or cancelled, 2 not accepted or not reachable. INT and TERM cancel the task.
# TASK_ID is the idempotency key: the same id and request again starts nothing new, but follows what runs.
# Needs curl 7.71+ and jq: JSON cannot be read with sed, which would take a variable named "status" for the status.
set -eu

[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
: "${TASK_RUNNER_URL:?}"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
curl_pid=

# call METHOD PATH [curl options]: sets $status, and leaves the answer in $dir/answer. Every call may be repeated.
call() {
  method=$1 path=$2
  shift 2
  : >"$dir/answer"
  # In the background, since a shell heeds signals only while it waits.
  authorization |
    curl --config - --silent --show-error --request "$method" --retry 10 --retry-all-errors --retry-max-time 300 \
      --max-time 60 --output "$dir/answer" --write-out '%{http_code}' "$@" "${TASK_RUNNER_URL%/}$path" >"$dir/status" &
  curl_pid=$!
  wait "$curl_pid" || true
  status=$(cat "$dir/status")
}

# For curl's standard input: there neither ps nor a file shows the token.
authorization() {
  [ -n "${TASK_RUNNER_TOKEN:-}" ] || return 0
  token=$(printf %s "$TASK_RUNNER_TOKEN" | sed 's/["\\]/\\&/g')
  printf 'header = "Authorization: Bearer %s"\n' "$token"
}

fail() {
  message=$(jq -r '.message // empty' "$dir/answer" 2>/dev/null || true)
  echo "$1: status $status ${message:-without a message}" >&2
  exit 2
}

# A task that has ended stays as it is; one that was never accepted needs no cancelling.
cancel() {
  call POST "$task/cancel" --retry-max-time 20
  case $status in
    200 | 404) ;;
    *) fail "Task $id could not be cancelled" ;;
  esac
}

stop() {
  trap '' INT TERM
  [ -z "$curl_pid" ] || kill "$curl_pid" 2>/dev/null || true
  # Who waits for curl to write into it would wait forever.
  [ ! -p "$dir/stream" ] || : <>"$dir/stream"
  cancel
  exit "$1"
}

# The data of the log's events (Server-Sent Events), which come through $dir/stream.
print_log() {
  tee -a "$dir/events" <"$dir/stream" | jq -nRj --unbuffered '
    foreach inputs as $line ({};
      if $line == "" then {}
      elif $line == "event: end" then {isEnd: true}
      elif $line | startswith("data: ") then .text = (if .text then "\n" else "" end) + $line[6:]
      else .text = null end;
      if .isEnd then empty else .text // empty end)'
}

[ "$1" = --cancel ] && id=$2 || id=$1
task=$(jq -rn --arg id "$id" '"/tasks/" + ($id | @uri)')
if [ "$1" = --cancel ]; then
  cancel
  exit 0
fi

# In worker files null, "" and "None" stand for absent.
jq -n --arg id "$id" --arg file "$2" --slurpfile worker "${3:-/dev/null}" '{
  task_id: $id,
  task_file_name: $file,
  worker_config: ($worker[0] // {} | with_entries(select(.value | . != null and . != "" and . != "None")))
}' >"$dir/request"
trap 'stop 130' INT
trap 'stop 143' TERM
call POST /task-runner --header 'content-type: application/json' --data-binary "@$dir/request" \
  ${TRACEPARENT:+--header "traceparent: $TRACEPARENT"}
[ "$status" = 200 ] || fail 'The task was not accepted'

mkfifo "$dir/stream"
: >"$dir/events"
failures=0
while :; do
  # A stream that was cut goes on where it was.
  last=$(sed -n 's/^id: //p' "$dir/events" | tail -n 1)
  authorization | curl --config - --silent --no-buffer --fail ${last:+--header "last-event-id: $last"} \
    "${TASK_RUNNER_URL%/}$task/logs?follow=true" >"$dir/stream" &
  curl_pid=$!
  print_log &
  wait $! || true
  wait "$curl_pid" || failures=$((failures + 1))
  call GET "$task"
  [ "$status" = 200 ] || fail "Task $id may still be running, but cannot be looked at"
  case $(jq -r .status "$dir/answer") in
    succeeded) exit 0 ;;
    failed | cancelled)
      jq -r '"Task \(.task_id) \(.status): \([.reason, .message] | map(values) | join(", "))"' "$dir/answer" >&2
      exit 1
      ;;
  esac
  # Where a proxy lets no stream through, the log comes in pieces, and less often.
  sleep "$((failures < 10 ? 1 : 10))" >/dev/null 2>&1 &
  wait $!
done
