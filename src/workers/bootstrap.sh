#!/bin/sh
# What every worker runs, on every backend: prepare, run the task file, record how it ended.
#
#   sh bootstrap.sh run WORKER_FOLDER TASK_FOLDER TASK_FILE PYTHON SHELL NODE
#       as a program: clones the repositories, runs the startup script if there is one, then the task file;
#       its exit code is ours
#   . bootstrap.sh
#       for the functions alone: a local slot shell runs plain tasks with them, without another exec
#
# The worker's folder holds: tasks/ (a copy of the task files), home/, tmp/, log, startup.sh (only with a
# startup script), repositories.sh and secret-<n> (only with repositories), and, written here, exit:
# "<phase> <exit code> <words>". TASK_FOLDER is where the task runs: tasks, or a repository below home.
# Needs only a POSIX system, and what the task itself needs; git 2.31 with repositories (2.37 pins addresses).

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

# finish WORKER_FOLDER PHASE CODE [WORDS]: the exit file is what a restarted service reads, and is written once
finish() {
  __tr_exit=
  [ -s "$1/exit" ] && read -r __tr_exit _ <"$1/exit"
  # In place, without cutting the file first: where it was made before, it can be written on a full disk.
  case $__tr_exit in
    clone | startup | task) ;;
    *) printf '%s\n' "$2 $3${4:+ $4}" 1<>"$1/exit" ;;
  esac
}

# fail WORKER_FOLDER PHASE CODE WORDS: what kept the task from running
fail() {
  echo "[task-runner] $4"
  rm -f "$1"/secret-*
  finish "$@"
  exit "$3"
}

# clone URL DIRECTORY BRANCH DEPTH ADDRESS SECRET_FILE KEEP [FOLDER...]: one line of repositories.sh. All but
# the first two may be empty. ADDRESS pins the host: the address that was judged is the one that is dialled.
clone() {
  echo "[task-runner] cloning $1 into ~/$2"
  (
    # Nobody is there to answer; redirects could lead where the judged address does not.
    export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true GIT_ALLOW_PROTOCOL=http:https:ssh __tr_secret="$6"
    export GIT_CONFIG_KEY_0=http.followRedirects GIT_CONFIG_VALUE_0=false
    # One that sends nothing for half a minute is down.
    export GIT_CONFIG_KEY_1=http.lowSpeedLimit GIT_CONFIG_VALUE_1=1
    export GIT_CONFIG_KEY_2=http.lowSpeedTime GIT_CONFIG_VALUE_2=30
    export GIT_CONFIG_KEY_3=credential.useHttpPath GIT_CONFIG_VALUE_3=true
    export GIT_CONFIG_KEY_4=http.curloptResolve GIT_CONFIG_VALUE_4="$5"
    export GIT_CONFIG_KEY_5=credential.helper GIT_CONFIG_VALUE_5= GIT_CONFIG_COUNT=6
    case $1 in
      ssh:*)
        __tr_ssh='ssh -o BatchMode=yes -o ConnectTimeout=30 -o StrictHostKeyChecking=accept-new'
        __tr_ssh="$__tr_ssh -o UserKnownHostsFile=.ssh/known_hosts ${5:+-o HostName=${5#*=} -o HostKeyAlias=${5%%=*}}"
        # shellcheck disable=SC2016 # git's shell expands it
        [ -n "$6" ] && __tr_ssh="$__tr_ssh"' -o IdentitiesOnly=yes -i "$__tr_secret"'
        export GIT_SSH_COMMAND="$__tr_ssh"
        mkdir -p .ssh
        ;;
      *)
        # shellcheck disable=SC2016 # git's shell expands it
        [ -n "$6" ] && export GIT_CONFIG_KEY_6=credential.helper GIT_CONFIG_COUNT=7 \
          GIT_CONFIG_VALUE_6='!git credential-store --file "$__tr_secret"'
        ;;
    esac
    __tr_url=$1 __tr_to=$2 __tr_branch=$3 __tr_depth=$4 __tr_keep=$7
    shift 7
    git clone --quiet ${__tr_branch:+--branch "$__tr_branch"} ${__tr_depth:+--depth "$__tr_depth"} \
      ${1+--no-checkout} -- "$__tr_url" "$__tr_to" || exit
    [ $# = 0 ] || { git -C "$__tr_to" sparse-checkout set "$@" && git -C "$__tr_to" checkout --quiet; } || exit
    [ -z "$__tr_keep" ] || {
      (umask 077 && cat "$__tr_secret" >>.git-credentials) &&
        git -C "$__tr_to" config credential.helper store &&
        git -C "$__tr_to" config credential.useHttpPath true
    }
  ) 2>"$__tr_folder/tmp/git-words"
}

# cloned CODE URL: after each clone; tells git's own words when it failed
cloned() {
  [ "$1" = 0 ] && return
  __tr_words=
  while IFS= read -r __tr_line || [ -n "$__tr_line" ]; do
    printf '%s\n' "$__tr_line"
    case $__tr_line in fatal:* | error:*) __tr_words=${__tr_words:-$__tr_line} ;; esac
  done <"$__tr_folder/tmp/git-words"
  case $__tr_words in
    *'returned error: 30'*) __tr_words="$__tr_words (redirects are not followed: give the final URL)" ;;
  esac
  fail "$__tr_folder" clone "$1" "git clone of $2 failed: ${__tr_words:-exit code $1}"
}

run() {
  __tr_folder=$1
  if [ -f "$1/repositories.sh" ]; then
    cd "$1/home" && . "$1/repositories.sh"
    rm -f "$1"/secret-*
  fi
  if [ -f "$1/startup.sh" ]; then
    (cd "$1/home" && exec "$5" "$1/startup.sh")
    __tr_code=$?
    [ "$__tr_code" = 0 ] ||
      fail "$1" startup "$__tr_code" "The startup script failed with exit code $__tr_code"
  fi
  cd "$1/$2" || fail "$1" startup 1 "The folder of the task is not there"
  # Only of a repository could nobody know before.
  [ "$2" = tasks ] || [ -f "./$3" ] || fail "$1" startup 127 "There is no file \"$3\" in ~/${2#home/}"
  choose_interpreter "$3" "$4" "$5" "$6"
  # shellcheck disable=SC2086 # no option is no argument
  "$__tr_interpreter" $__tr_option "./$3"
  __tr_code=$?
  finish "$1" task "$__tr_code"
  exit "$__tr_code"
}

case ${1-} in
  run) shift; run "$@" ;;
esac
