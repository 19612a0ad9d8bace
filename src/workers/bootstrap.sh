#!/bin/sh
# What every worker runs, on every backend: prepare, run the task file, record how it ended.
#
#   sh bootstrap.sh run WORKER_FOLDER TASK_FILE PYTHON SHELL NODE
#       as a program: the startup script if there is one, then the task file; its exit code is ours
#   . bootstrap.sh
#       for the functions alone: a local slot shell runs plain tasks with them, without another exec
#
# The worker's folder holds: tasks/ (a copy of the task files, where the task runs), home/, tmp/, log,
# startup.sh (only with a startup script), and, written here, exit: "<phase> <exit code>".
# Needs only sh and what the task itself needs.

# Our variables have names that no task uses: one that came with the environment would reach the task changed.

# choose_interpreter TASK_FILE PYTHON SHELL NODE: sets $__tr_interpreter and $__tr_option
choose_interpreter() {
  __tr_option=
  case $1 in
    *.py) __tr_interpreter=$2 __tr_option=-u ;; # unbuffered, so that logs flow
    *.sh) __tr_interpreter=$3 ;;
    *) __tr_interpreter=$4 ;;
  esac
}

# finish WORKER_FOLDER PHASE CODE: the exit file is what a restarted service reads, and is written once
finish() {
  __tr_exit=
  [ -s "$1/exit" ] && read -r __tr_exit _ <"$1/exit"
  # In place, without cutting the file first: where it was made before, it can be written on a full disk.
  case $__tr_exit in
    startup | task) ;;
    *) echo "$2 $3" 1<>"$1/exit" ;;
  esac
}

run() {
  if [ -f "$1/startup.sh" ]; then
    (cd "$1/home" && exec "$4" "$1/startup.sh")
    __tr_code=$?
    if [ "$__tr_code" != 0 ]; then
      echo "[task-runner] the startup script failed with exit code $__tr_code"
      finish "$1" startup "$__tr_code"
      exit "$__tr_code"
    fi
  fi
  choose_interpreter "$2" "$3" "$4" "$5"
  # shellcheck disable=SC2086 # no option is no argument
  cd "$1/tasks" && "$__tr_interpreter" $__tr_option "./$2"
  __tr_code=$?
  finish "$1" task "$__tr_code"
  exit "$__tr_code"
}

case ${1-} in
  run) shift; run "$@" ;;
esac
