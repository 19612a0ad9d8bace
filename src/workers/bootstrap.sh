#!/bin/sh
# What every worker runs, on every backend: prepare, run the task file, record how it ended.
#
#   sh bootstrap.sh run WORKER_FOLDER TASK_FOLDER TASK_FILE PYTHON SHELL NODE
#       as a program: clones the repositories, runs the startup script if there is one, then the task file;
#       its exit code is ours
#   sh bootstrap.sh contain WORKER_FOLDER KEEP MESSAGE_FILE TASK_FOLDER TASK_FILE PYTHON SHELL NODE
#       as the program of a container: `run` with the environment of environment.sh; ends whatever is left.
#       KEEP, unless empty: stays for a look inside after the task has ended. MESSAGE_FILE, unless empty: gets a
#       copy of what is written to exit
#   . bootstrap.sh
#       for the functions alone: a local slot shell runs plain tasks with them, without another exec
#
# The worker's folder holds: tasks/ (a copy of the task files), home/, tmp/, startup.sh (only with a startup
# script), repositories.sh and secret-<n> (only with repositories), environment.sh and notes (only in
# containers), and, written here, exit: "<phase> <exit code> <words>" (on local workers "begun" until then). TASK_FOLDER is where the task runs: tasks, or a repository below home.
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

# told WORKER_FOLDER: succeeds when the exit file says how the task ended; sets $__tr_told to its
# text. The task may have put anything there: only the beginning of a plain file is read.
told() {
  __tr_told=
  {
    [ -s "$1/exit" ] && [ -f "$1/exit" ] && __tr_told=$(dd if="$1/exit" bs=4096 count=1)
  } 2>/dev/null
  case $__tr_told in
    'clone '[0-9]* | 'startup '[0-9]* | 'task '[0-9]*) ;;
    *) return 1 ;;
  esac
}

# finish WORKER_FOLDER PHASE CODE [WORDS]: the exit file is what a restarted service reads
finish() {
  # In place, without cutting the file first: where it was made before, it can be written on a full disk.
  printf '%s\n' "$2 $3${4:+ $4}" 1<>"$1/exit"
}

# fail WORKER_FOLDER PHASE CODE WORDS: what kept the task from running
fail() {
  echo "[task-runner] $4"
  rm -f "$1"/secret-*
  told "$1" || finish "$@"
  exit "$3"
}

# clone URL DIRECTORY BRANCH DEPTH ADDRESS SECRET_FILE KEEP [FOLDER...]: one line of repositories.sh. All but
# the first two may be empty. ADDRESS pins the host: the address that was judged is the one that is dialled.
clone() {
  echo "[task-runner] cloning $1 into ~/$2"
  (
    # What the task's variables must not change about the clone.
    unset GIT_CONFIG_PARAMETERS GIT_TRACE GIT_TRACE_CURL GIT_CURL_VERBOSE GIT_TRACE_REDACT GIT_DIR GIT_WORK_TREE
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
        # Nothing of the user that the worker happens to run as: no configuration, no keys.
        __tr_ssh='ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -o IdentityAgent=none -o ConnectTimeout=30'
        __tr_ssh="$__tr_ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=2 -o StrictHostKeyChecking=accept-new"
        __tr_ssh="$__tr_ssh -o UserKnownHostsFile=.ssh/known_hosts ${5:+-o HostName=${5#*=} -o HostKeyAlias=${5%%=*}}"
        # shellcheck disable=SC2016 # git's shell expands it
        [ -n "$6" ] && __tr_ssh="$__tr_ssh"' -i "$__tr_secret"' || __tr_ssh="$__tr_ssh -o IdentityFile=none"
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
  __tr_folder=$1 __tr_stopped=
  # What is at work gets the signal as well, ends in its own way, and its exit code is the task's.
  trap '__tr_stopped=1' TERM
  command -v "$5" >/dev/null 2>&1 || set -- "$1" "$2" "$3" "$4" sh "$6"
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
  [ -z "$__tr_stopped" ] || fail "$1" task 143 "Stopped before the task ran"
  cd "$1/$2" || fail "$1" startup 1 "The folder of the task is not there"
  # Only of a repository could nobody know before.
  [ "$2" = tasks ] || [ -f "./$3" ] || fail "$1" startup 127 "There is no file \"$3\" in ~/${2#home/}"
  choose_interpreter "$3" "$4" "$5" "$6"
  # shellcheck disable=SC2086 # no option is no argument
  "$__tr_interpreter" $__tr_option "./$3"
  __tr_code=$?
  told "$1" || finish "$1" task "$__tr_code"
  exit "$__tr_code"
}

contain() {
  __tr_folder=$1 __tr_keep=$2 __tr_message=$3
  shift 3
  # All there is in a container, but never on a machine that this was started on by mistake.
  __tr_all=0 __tr_init=
  read -r __tr_init </proc/1/comm 2>/dev/null
  case $$:$PPID:$__tr_init in
    1:* | *:1:docker-init | *:1:podman-init | *:1:catatonit) __tr_all=-1 ;;
  esac
  # Our own group is sent the signal as well, which must not come back for ever.
  trap 'trap "" TERM; kill -TERM "$__tr_all" 2>/dev/null' TERM
  # What a shell starts in the background ignores INT and QUIT, and so would everything below it.
  __tr_reset='env --default-signal=INT,QUIT'
  $__tr_reset true 2>/dev/null || __tr_reset=
  (
    . "$__tr_folder/environment.sh"
    rm -f "$__tr_folder/environment.sh"
    [ ! -f "$__tr_folder/notes" ] || while IFS= read -r __tr_line; do
      printf '%s\n' "$__tr_line"
    done <"$__tr_folder/notes"
    # A shell of its own, which takes none of these variables for its own.
    # shellcheck disable=SC2086 # three words, or none
    exec $__tr_reset /bin/sh "$__tr_folder/bootstrap.sh" run "$__tr_folder" "$@"
  ) </dev/null 2>&1 & # one stream, or its lines would lose their order
  __tr_pid=$!
  # A signal ends `wait` before what it waits for.
  while :; do
    wait "$__tr_pid"
    __tr_code=$?
    kill -0 "$__tr_pid" 2>/dev/null || break
  done
  # From here on nothing is left that could change the exit file.
  [ "$__tr_all" = 0 ] || kill -KILL -1 2>/dev/null
  if told "$__tr_folder" || { finish "$__tr_folder" task "$__tr_code" && told "$__tr_folder"; }; then
    [ -z "$__tr_message" ] || printf '%s\n' "$__tr_told" >"$__tr_message"
    if [ -n "$__tr_keep" ]; then
      trap 'exit 0' TERM
      while :; do
        sleep 3600 &
        wait $!
      done
    fi
    __tr_code=${__tr_told#* }
    __tr_code=${__tr_code%%[!0-9]*}
  fi
  exit "$__tr_code"
}

case ${1-} in
  run | contain) "$@" ;;
esac
