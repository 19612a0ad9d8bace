#!/bin/sh
# Runs one task on a worker of any backend and records how it ended.
#
# sh bootstrap.sh run WORKER_FOLDER TASK_FOLDER TASK_FILE PYTHON SHELL NODE [NODE_OPTION]
#   clones the repositories, runs the startup script if there is one, then the task file, and exits
#   with its exit code
# sh bootstrap.sh contain WORKER_FOLDER KEEP MESSAGE_FILE GRACE_MS <arguments of run but the first>
#   is the program of a container: calls `run` with the environment of environment.sh, then ends all
#   other processes. KEEP, unless empty: stays after the task, so that people can look inside.
#   MESSAGE_FILE, unless empty: gets a copy of the exit file. GRACE_MS: time to end after TERM
# . bootstrap.sh
#   only defines the functions: local slot shells run plain tasks with them, without another exec
#
# The worker's folder holds tasks/ (a copy of the task files), home/, tmp/, startup.sh (only with a
# startup script), repositories.sh and secret-<n> (only with repositories), environment.sh and notes
# (only in containers), package.json (only on local workers), and exit, written here: "<phase> <exit
# code> <message>". Until the task ends, exit says "begun" on local workers; in containers that stay
# it gets a second line "over" once no process of the task is left. TASK_FOLDER, the task's working
# folder, is tasks or a repository below home. Needs only a POSIX system, and what the task needs.

# Variables begin with __tr_: a variable of the task with the same name would be overwritten.

# A carriage return and a byte order mark.
__tr_marks=$(printf '\r|\357\273\277')
__tr_cr=${__tr_marks%%|*} __tr_bom=${__tr_marks#*|}
__tr_newline='
'
__tr_is_cloned=''

# choose_interpreter FILE PYTHON SHELL NODE PATH [NODE_OPTION]: sets $__tr_interpreter,
# $__tr_options (one a line) and $__tr_notes (lines for the log). Until restore_splitting, the shell
# splits unquoted variables at newlines only and expands no patterns. FILE begins with ./ or /. PATH
# is the task's. Starts no process for most scripts: a slot shell runs hundreds of them a second.
choose_interpreter() {
  __tr_file=$1 __tr_python=$2 __tr_shell=$3 __tr_node=$4 __tr_path=$5 __tr_options='' __tr_notes=''
  __tr_kind=${1##*.}
  case $__tr_kind in
    py) __tr_interpreter=$2 __tr_options=-u$__tr_newline ;; # unbuffered, so that logs flow
    sh) __tr_interpreter=$3 ;;
    *) __tr_interpreter=$4 __tr_options=${6:+$6$__tr_newline} ;;
  esac
  read_first_line
  set -f
  case $__tr_line in
    '#!'*)
      # shellcheck disable=SC2086 # split into words; the kernel would pass all options as one
      follow_shebang ${__tr_line#??}
      ;;
  esac
  case $__tr_kind:${__tr_interpreter##*/} in
    sh:*sh | sh:env | sh:"${__tr_shell##*/}") check_encoding ;;
  esac
  IFS=$__tr_newline
}

restore_splitting() {
  set +f
  unset IFS
}

# note TEXT: adds a line to $__tr_notes
note() {
  __tr_notes="$__tr_notes[task-runner] $1$__tr_newline"
}

# read_first_line: sets $__tr_line to the first line without BOM and CR, and $__tr_has_bom and
# $__tr_has_cr, which are empty if it had none
read_first_line() {
  __tr_line='' __tr_has_bom='' __tr_has_cr=''
  [ -f "$__tr_file" ] && [ -r "$__tr_file" ] || return 0
  case $__tr_kind in
    py | sh) IFS= read -r __tr_line <"$__tr_file" ;;
    *)
      # The first line of a bundle may have megabytes, and some shells read byte by byte.
      { __tr_line=$(dd if="$__tr_file" bs=256 count=1); } 2>/dev/null
      __tr_line=${__tr_line%%"$__tr_newline"*}
      ;;
  esac
  case $__tr_line in "$__tr_bom"*) __tr_has_bom=1 __tr_line=${__tr_line#"$__tr_bom"} ;; esac
  case $__tr_line in *"$__tr_cr") __tr_has_cr=1 __tr_line=${__tr_line%"$__tr_cr"} ;; esac
}

# follow_shebang [WORD...]: takes over the interpreter and options that a "#!" line names
follow_shebang() {
  [ $# != 0 ] || return 0
  __tr_asked=$1
  shift
  case $__tr_asked in
    env | */env)
      case ${1-}:$__tr_line in
        # env parses the quotes itself and expects all of it as one word.
        -S*:*[\'\"\\\$]* | --split-string*:*[\'\"\\\$]*)
          __tr_line=${__tr_line#*"$__tr_asked"}
          set -- "-${__tr_line#*-}"
          ;;
        -S:* | --split-string:*) shift ;;
        -S*) __tr_word=${1#-S} && shift && set -- "$__tr_word" "$@" ;;
        --split-string=*) __tr_word=${1#*=} && shift && set -- "$__tr_word" "$@" ;;
      esac
      case ${1-} in
        # Options and variables are for env itself, which therefore has to run.
        '' | -* | *=*) ;;
        *) __tr_asked=$1 && shift ;;
      esac
      ;;
  esac
  case $__tr_kind:${__tr_asked##*/} in
    sh:*) follow_program || return 0 ;;
    py:python* | py:pypy* | *[jt]s:node | *[jt]s:nodejs) ;;
    *)
      note "the first line asks for \"$__tr_asked\", but .$__tr_kind files always run with $__tr_interpreter"
      return
      ;;
  esac
  for __tr_word; do
    __tr_options=$__tr_options$__tr_word$__tr_newline
  done
}

# follow_program: makes $__tr_asked, or the best replacement, the interpreter. Fails if the options
# have no meaning for the replacement.
follow_program() {
  find_program "$__tr_asked" && __tr_interpreter=$__tr_found && return
  __tr_drops_options=
  if find_program "${__tr_asked##*/}"; then
    __tr_interpreter=$__tr_found
  else
    case ${__tr_asked##*/} in
      python* | pypy*) __tr_interpreter=$__tr_python ;;
      node | nodejs) __tr_interpreter=$__tr_node ;;
      # Options are kept: without -e, a script that fails could end as a success.
      sh | ash | bash | dash | ksh* | mksh | zsh) ;;
      *) __tr_drops_options=1 ;;
    esac
  fi
  note "\"$__tr_asked\", which the first line asks for, is not here: $__tr_interpreter runs it instead"
  [ -z "$__tr_drops_options" ]
}

# find_program NAME: sets $__tr_found to the path of a program; fails if there is none
find_program() {
  __tr_found=$1
  case $1 in
    */*) [ -f "$1" ] && [ -x "$1" ] && return ;;
    *)
      IFS=:
      for __tr_found in $__tr_path; do
        __tr_found=${__tr_found:-.}/$1
        [ -f "$__tr_found" ] && [ -x "$__tr_found" ] && unset IFS && return
      done
      unset IFS
      ;;
  esac
  return 1
}

# check_encoding: notes a BOM and Windows line ends, and removes the BOM where it may
check_encoding() {
  case $__tr_file in
    ./*) __tr_what='this script' ;;
    *) __tr_what='the startup script' ;;
  esac
  [ -z "$__tr_has_cr" ] ||
    note "$__tr_what has Windows line ends (CRLF), which shells do not understand; save it with LF"
  [ -n "$__tr_has_bom" ] || return 0
  __tr_done=
  # Files of a repository are not changed: the task would see a diff.
  [ -n "$__tr_is_cloned" ] || {
    cp -p "$__tr_file" "$__tr_file.part" && tail -c +4 "$__tr_file" >"$__tr_file.part" &&
      mv -f "$__tr_file.part" "$__tr_file" && __tr_done='; it runs without' || rm -f "$__tr_file.part"
  } 2>/dev/null
  note "$__tr_what begins with a byte order mark (BOM), which shells do not understand$__tr_done; save it as UTF-8 without BOM"
}

# read_exit WORKER_FOLDER: sets $__tr_exit to the content of the exit file; fails unless it says how
# the task ended. The task may have replaced it: only the first 4 KB of a plain file are read.
read_exit() {
  __tr_exit=
  {
    [ -s "$1/exit" ] && [ -f "$1/exit" ] && __tr_exit=$(dd if="$1/exit" bs=4096 count=1)
  } 2>/dev/null
  case $__tr_exit in
    'clone '[0-9]* | 'startup '[0-9]* | 'task '[0-9]*) ;;
    *) return 1 ;;
  esac
}

# write_exit WORKER_FOLDER PHASE CODE [MESSAGE]: writes the exit file
write_exit() {
  # Overwrites without truncating: an existing file can then be written on a full disk.
  printf '%s\n' "$2 $3${4:+ $4}" 1<>"$1/exit"
}

# fail WORKER_FOLDER PHASE CODE MESSAGE: exits, recording why the task did not run
fail() {
  printf '[task-runner] %s\n' "$4" # echo would print \t as a tab
  rm -f "$1"/secret-*
  read_exit "$1" || write_exit "$@"
  exit "$3"
}

# link_home WORKER_FOLDER TASK_FOLDER: makes the links that scripts for Practicus AI expect in ~,
# unless they exist: in the image, on a mounted disk, or made by a local worker
link_home() (
  cd "$1/home" || exit
  [ -e my ] || { mkdir -p projects my && ln -s ../projects my/projects; }
  [ -e practicus/task ] && [ "$2" = tasks ] ||
    { mkdir -p practicus && rm -f practicus/task && ln -s "$1/$2" practicus/task; }
)

run() {
  __tr_folder=$1 __tr_stopped=
  # The task gets the signal as well; it decides how to end.
  trap '__tr_stopped=1' TERM
  command -v "$5" >/dev/null 2>&1 || set -- "$1" "$2" "$3" "$4" sh "$6" "${7-}"
  link_home "$1" "$2"
  if [ -f "$1/repositories.sh" ]; then
    cd "$1/home" && . "$1/repositories.sh"
    rm -f "$1"/secret-*
  fi
  if [ -f "$1/startup.sh" ]; then
    (
      cd "$1/home" || exit
      choose_interpreter "$1/startup.sh" "$4" "$5" "$6" "$PATH" "${7-}"
      printf %s "$__tr_notes"
      # shellcheck disable=SC2086 # one word a line
      exec "$__tr_interpreter" $__tr_options "$1/startup.sh"
    )
    __tr_code=$?
    [ "$__tr_code" = 0 ] ||
      fail "$1" startup "$__tr_code" "The startup script failed with exit code $__tr_code"
  fi
  [ -z "$__tr_stopped" ] || fail "$1" task 143 "Stopped before the task ran"
  cd "$1/$2" || fail "$1" startup 1 "The task's folder is missing"
  # Files of the tasks folder were checked before; a repository's could not be.
  [ "$2" = tasks ] || [ -f "./$3" ] || fail "$1" startup 127 "There is no file \"$3\" in ~/${2#home/}"
  [ "$2" = tasks ] || __tr_is_cloned=1
  choose_interpreter "./$3" "$4" "$5" "$6" "$PATH" "${7-}"
  printf %s "$__tr_notes"
  # shellcheck disable=SC2086 # one word a line
  "$__tr_interpreter" $__tr_options "./$3"
  __tr_code=$?
  restore_splitting
  read_exit "$1" || write_exit "$1" task "$__tr_code"
  exit "$__tr_code"
}

# read_clock: sets $__tr_now to a time in hundredths of a second
read_clock() {
  __tr_up=
  read -r __tr_up __tr_idle </proc/uptime
  case $__tr_up in
    *[!0-9.]* | '') __tr_now=$((__tr_now + 10)) ;;
    # A fraction with a leading 0 would be read as an octal number.
    *) __tr_now=$((${__tr_up%%.*} * 100 + 1${__tr_up##*.} - 100)) ;;
  esac
} 2>/dev/null

# find_others MAX [LOG] [EXCEPT]: counts up to MAX processes in $__tr_count, besides this one, the
# container's init and EXCEPT, and lists the first names in $__tr_names; fails if there are none.
# LOG, unless empty: counts only processes that can write to the log
find_others() {
  __tr_count=0 __tr_names=
  for __tr_process in /proc/[0-9]*; do
    case ${__tr_process#/proc/} in 1 | "$$" | "${3-}") continue ;; esac
    # shellcheck disable=SC3013 # dash and busybox have it
    [ -z "${2-}" ] || [ "$__tr_process/fd/1" -ef "/proc/$$/fd/1" ] ||
      [ "$__tr_process/fd/2" -ef "/proc/$$/fd/1" ] || continue
    __tr_name= __tr_state=
    while read -r __tr_key __tr_value; do
      case $__tr_key in
        Name:) __tr_name=$__tr_value ;;
        State:) __tr_state=$__tr_value && break ;;
      esac
    done 2>/dev/null <"$__tr_process/status"
    # Skips zombies, and processes that have ended.
    case $__tr_state in Z* | X* | '') continue ;; esac
    __tr_count=$((__tr_count + 1))
    [ "$__tr_count" -gt 5 ] || {
      # A process may choose any name: other characters become "?".
      while :; do
        __tr_head=${__tr_name%%[!A-Za-z0-9' '._+:@/?-]*}
        [ "$__tr_head" != "$__tr_name" ] || break
        __tr_name=$__tr_head'?'${__tr_name#"$__tr_head"?}
      done
      __tr_names="$__tr_names${__tr_names:+, }${__tr_name:-?}"
    }
    [ "$__tr_count" -lt "$1" ] || break
  done
  [ "$__tr_count" -gt 0 ]
}

# is_crowded: succeeds if there may be too many processes to fork; a shell that cannot fork exits
is_crowded() {
  set -- /proc/[0-9]*
  [ $# -gt 200 ]
}

# end_others: waits for the task's other processes, then kills them and logs their names. After TERM
# it waits for all of them until the grace period is over; otherwise it waits 2 s for those that can
# write to the log, such as a filter that the log goes through.
end_others() {
  if [ -n "$__tr_sees" ]; then
    read_clock
    __tr_last=$((__tr_now + 200))
    while :; do
      read_clock
      if [ -n "$__tr_until" ]; then
        [ "$__tr_now" -lt "$__tr_until" ] && find_others 1 || break
      else
        [ "$__tr_now" -lt "$__tr_last" ] && ! is_crowded && find_others 1 log || break
      fi
      # POSIX requires only whole seconds.
      sleep 0.1 || sleep 1 || break
    done 2>/dev/null
    # A process closes its files shortly before it is gone.
    [ -n "$__tr_until" ] || is_crowded || ! find_others 1 || sleep 0.1 2>/dev/null
    # Stopped processes cannot fork or rename themselves while they are listed.
    kill -STOP -1 2>/dev/null
    find_others 100000 '' "$__tr_pid"
  fi
  [ "$__tr_all" = 0 ] || kill -KILL -1 2>/dev/null
  case $__tr_count in
    0) return ;;
    1) __tr_line='1 process that was' ;;
    *) __tr_line="$__tr_count processes that were" ;;
  esac
  [ "$__tr_count" -le 5 ] || __tr_names="$__tr_names and $((__tr_count - 5)) more"
  printf '[task-runner] Ended %s still running: %s\n' "$__tr_line" "$__tr_names"
}

# record_exit: makes sure that the exit file says how the task ended, and copies it to the engine's
# message file; fails if it cannot be written
record_exit() {
  read_exit "$__tr_folder" || {
    write_exit "$__tr_folder" task "$__tr_code" 2>/dev/null && read_exit "$__tr_folder"
  } || return
  [ -z "$__tr_message" ] || printf '%s\n' "$__tr_exit" >"$__tr_message"
}

contain() {
  __tr_folder=$1 __tr_keep=$2 __tr_message=$3 __tr_grace=$4
  shift 4
  # -1 signals all processes: never on a machine where this was started by mistake, outside a
  # container.
  __tr_all=0 __tr_init=
  read -r __tr_init </proc/1/comm 2>/dev/null
  case $$:$PPID:$__tr_init in
    1:* | *:1:docker-init | *:1:podman-init | *:1:catatonit) __tr_all=-1 ;;
  esac
  # The /proc of another PID namespace would list processes that are not the task's.
  __tr_sees= __tr_until= __tr_now=0 __tr_count=0
  # shellcheck disable=SC3013 # dash and busybox have it
  [ "$__tr_all" = 0 ] || [ ! "/proc/$$" -ef /proc/self ] || __tr_sees=1
  # Ignores TERM from here on: `kill` signals this shell as well.
  trap 'trap "" TERM; kill -TERM "$__tr_all" 2>/dev/null
    read_clock; __tr_until=$((__tr_now + __tr_grace / 10))' TERM
  # Background jobs of a shell ignore INT and QUIT, and so would the task and its children.
  __tr_reset='env --default-signal=INT,QUIT'
  $__tr_reset true 2>/dev/null || __tr_reset=
  (
    . "$__tr_folder/environment.sh"
    rm -f "$__tr_folder/environment.sh"
    [ ! -f "$__tr_folder/notes" ] || while IFS= read -r __tr_line; do
      printf '%s\n' "$__tr_line"
    done <"$__tr_folder/notes"
    # A new shell: variables such as IFS then reach the task without changing this script.
    # shellcheck disable=SC2086 # three words, or none
    exec $__tr_reset /bin/sh "$__tr_folder/bootstrap.sh" run "$__tr_folder" "$@"
  ) </dev/null 2>&1 & # one stream keeps the order of the lines
  __tr_pid=$!
  # `wait` also returns on a signal, while the task still runs.
  while :; do
    wait "$__tr_pid"
    __tr_code=$?
    kill -0 "$__tr_pid" 2>/dev/null || break
    [ -z "$__tr_until" ] || end_others
  done
  # Records now, in case the engine kills this container while it waits for the other processes.
  is_crowded || record_exit
  end_others
  # No process is left that could change the exit file: what it says now is final.
  if record_exit; then
    if [ -n "$__tr_keep" ]; then
      printf 'over\n' >>"$__tr_folder/exit"
      trap 'exit 0' TERM
      while :; do
        sleep 3600 &
        wait $!
      done
    fi
    __tr_code=${__tr_exit#* }
    __tr_code=${__tr_code%%[!0-9]*}
  fi
  exit "$__tr_code"
}

case ${1-} in
  run | contain) "$@" ;;
esac
