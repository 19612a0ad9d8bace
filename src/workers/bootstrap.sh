#!/bin/sh
# What every worker runs, on every backend: prepare, run the task file, record how it ended.
#
#   sh bootstrap.sh run WORKER_FOLDER TASK_FOLDER TASK_FILE PYTHON SHELL NODE [NODE_OPTION]
#       as a program: clones the repositories, runs the startup script if there is one, then the task file;
#       its exit code is ours
#   sh bootstrap.sh contain WORKER_FOLDER KEEP MESSAGE_FILE GRACE_MS TASK_FOLDER TASK_FILE PYTHON SHELL NODE
#       as the program of a container: `run` with the environment of environment.sh; ends whatever is left.
#       KEEP, unless empty: stays for a look inside after the task has ended. MESSAGE_FILE, unless empty: gets a
#       copy of what is written to exit. GRACE_MS: how long all of the task may take to end after TERM
#   . bootstrap.sh
#       for the functions alone: a local slot shell runs plain tasks with them, without another exec
#
# The worker's folder holds: tasks/ (a copy of the task files), home/, tmp/, startup.sh (only with a startup
# script), repositories.sh and secret-<n> (only with repositories), environment.sh and notes (only in
# containers), package.json (only on local workers), and, written here, exit: "<phase> <exit code> <words>" (on local
# workers "begun" until then; in containers that stay, a second line "over" once nothing is left of the task). TASK_FOLDER
# is where the task runs: tasks, or a repository below home.
# Needs only a POSIX system, and what the task itself needs; git 2.31 with repositories (2.37 pins addresses).

# Our variables have names that no task uses: one that came with the environment would reach the task changed.

# A carriage return, and a byte order mark.
__tr_marks=$(printf '\r|\357\273\277')
__tr_cr=${__tr_marks%%|*} __tr_bom=${__tr_marks#*|}
__tr_newline='
'
__tr_is_cloned=''

# choose_interpreter FILE PYTHON SHELL NODE PATH [NODE_OPTION]: sets $__tr_interpreter, $__tr_options (one a line) and
# $__tr_notes (lines for the log). Leaves the shell so that an unquoted $__tr_options becomes a word for each line, and
# nothing of it is expanded; restore_words ends that. FILE begins with ./ or /. PATH is the task's. Starts no process for
# most scripts, since a slot shell runs hundreds of them a second.
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
      # shellcheck disable=SC2086 # words, as people mean them; the kernel makes one of all options
      follow_line ${__tr_line#??}
      ;;
  esac
  case $__tr_kind:${__tr_interpreter##*/} in
    sh:*sh | sh:env | sh:"${__tr_shell##*/}") look_for_windows ;;
  esac
  IFS=$__tr_newline
}

restore_words() {
  set +f
  unset IFS
}

# note WORDS: adds a line to $__tr_notes
note() {
  __tr_notes="$__tr_notes[task-runner] $1$__tr_newline"
}

# read_first_line: sets $__tr_line; $__tr_has_bom and $__tr_has_cr say what is left out of it
read_first_line() {
  __tr_line='' __tr_has_bom='' __tr_has_cr=''
  [ -f "$__tr_file" ] && [ -r "$__tr_file" ] || return 0
  case $__tr_kind in
    py | sh) IFS= read -r __tr_line <"$__tr_file" ;;
    *)
      # A bundle may be one line of megabytes, and some shells read a byte at a time.
      { __tr_line=$(dd if="$__tr_file" bs=256 count=1); } 2>/dev/null
      __tr_line=${__tr_line%%"$__tr_newline"*}
      ;;
  esac
  case $__tr_line in "$__tr_bom"*) __tr_has_bom=1 __tr_line=${__tr_line#"$__tr_bom"} ;; esac
  case $__tr_line in *"$__tr_cr") __tr_has_cr=1 __tr_line=${__tr_line%"$__tr_cr"} ;; esac
}

# follow_line [WORD...]: the words of a "#!" line
follow_line() {
  [ $# != 0 ] || return 0
  __tr_asked=$1
  shift
  case $__tr_asked in
    env | */env)
      case ${1-}:$__tr_line in
        # It reads quotes itself, from one word, as the kernel gives it.
        -S*:*[\'\"\\\$]* | --split-string*:*[\'\"\\\$]*)
          __tr_line=${__tr_line#*"$__tr_asked"}
          set -- "-${__tr_line#*-}"
          ;;
        -S:* | --split-string:*) shift ;;
        -S*) __tr_word=${1#-S} && shift && set -- "$__tr_word" "$@" ;;
        --split-string=*) __tr_word=${1#*=} && shift && set -- "$__tr_word" "$@" ;;
      esac
      case ${1-} in
        # Options and variables of its own: it has to run.
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

# follow_program: makes $__tr_asked the interpreter, or what comes nearest. Fails where its options mean nothing then.
follow_program() {
  find_program "$__tr_asked" && __tr_interpreter=$__tr_found && return
  __tr_drops_options=
  if find_program "${__tr_asked##*/}"; then
    __tr_interpreter=$__tr_found
  else
    case ${__tr_asked##*/} in
      python* | pypy*) __tr_interpreter=$__tr_python ;;
      node | nodejs) __tr_interpreter=$__tr_node ;;
      # Without its -e, a script that has failed would end as a success.
      sh | ash | bash | dash | ksh* | mksh | zsh) ;;
      *) __tr_drops_options=1 ;;
    esac
  fi
  note "\"$__tr_asked\", which the first line asks for, is not here: $__tr_interpreter runs it instead"
  [ -z "$__tr_drops_options" ]
}

# find_program NAME: sets $__tr_found to its path. Fails where there is none.
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

# look_for_windows: notes what shells do not understand about files that were made there
look_for_windows() {
  case $__tr_file in
    ./*) __tr_what='this script' ;;
    *) __tr_what='the startup script' ;;
  esac
  [ -z "$__tr_has_cr" ] ||
    note "$__tr_what has Windows line ends (CRLF), which shells do not understand; save it with LF"
  [ -n "$__tr_has_bom" ] || return 0
  __tr_done=
  # What a repository holds stays as it is, or the task would see a change that nobody made.
  [ -n "$__tr_is_cloned" ] || {
    cp -p "$__tr_file" "$__tr_file.part" && tail -c +4 "$__tr_file" >"$__tr_file.part" &&
      mv -f "$__tr_file.part" "$__tr_file" && __tr_done='; it runs without' || rm -f "$__tr_file.part"
  } 2>/dev/null
  note "$__tr_what begins with a byte order mark (BOM), which shells do not understand$__tr_done; save it as UTF-8 without BOM"
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
  printf '[task-runner] %s\n' "$4" # where echo would take \t for a tab
  rm -f "$1"/secret-*
  told "$1" || finish "$@"
  exit "$3"
}

# git_config KEY VALUE: for every git command of this shell, and those that git starts itself
git_config() {
  export "GIT_CONFIG_KEY_$GIT_CONFIG_COUNT=$1" "GIT_CONFIG_VALUE_$GIT_CONFIG_COUNT=$2"
  export GIT_CONFIG_COUNT=$((GIT_CONFIG_COUNT + 1))
}

# guard URL ADDRESS SECRET_FILE: binds the git commands of this shell to the URL's host, and sets $__tr_origin to what its
# URLs begin with. ADDRESS, unless empty, pins the host: the address that was judged is the one that is dialled.
guard() {
  # What the task's variables must not change about the clone.
  unset GIT_CONFIG_PARAMETERS GIT_TRACE GIT_TRACE_CURL GIT_CURL_VERBOSE GIT_TRACE_REDACT GIT_DIR GIT_WORK_TREE
  __tr_host=${1#*://}
  __tr_host=${__tr_host%%/*}
  __tr_origin=${1%%://*}://$__tr_host
  __tr_host=${__tr_host#*@}
  __tr_host=${__tr_host%:[0-9]*}
  # Nobody is there to answer. Git LFS would ask hosts that nobody judged.
  export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true GIT_ALLOW_PROTOCOL="${1%%://*}" GIT_LFS_SKIP_SMUDGE=1
  export GIT_CONFIG_COUNT=0 __tr_secret="$3" __tr_home="$__tr_folder/home"
  # Redirects could lead where the judged address does not.
  git_config http.followRedirects false
  # One that sends nothing for half a minute is down.
  git_config http.lowSpeedLimit 1
  git_config http.lowSpeedTime 30
  git_config http.curloptResolve "$2"
  git_config credential.helper ''
  # Submodules: another spelling of the host is the host, and all others lead nowhere.
  for __tr_spelling in "$__tr_origin/" "git@$__tr_host:" "ssh://git@$__tr_host/" "https://$__tr_host/"; do
    git_config "url.$__tr_origin/.insteadOf" "$__tr_spelling"
  done
  for __tr_spelling in http:// https:// http:: https::; do
    git_config url.unchecked://.insteadOf "$__tr_spelling"
  done
  case $1 in
    ssh:*)
      # Nothing of the user that the worker happens to run as: no configuration, no keys. Submodules are elsewhere.
      # shellcheck disable=SC2016 # git's shell expands it
      __tr_ssh='cd "$__tr_home" && ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -o IdentityAgent=none'
      __tr_ssh="$__tr_ssh -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=2 -o LogLevel=ERROR"
      __tr_ssh="$__tr_ssh -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=.ssh/known_hosts"
      __tr_ssh="$__tr_ssh -o HostName=${2#*=} -o HostKeyAlias=${2%%=*}"
      # shellcheck disable=SC2016 # git's shell expands it
      [ -n "$3" ] && __tr_ssh="$__tr_ssh"' -i "$__tr_secret"' || __tr_ssh="$__tr_ssh -o IdentityFile=none"
      export GIT_SSH_COMMAND="$__tr_ssh" GIT_SSH_VARIANT=ssh
      mkdir -p "$__tr_home/.ssh"
      ;;
    *)
      # It answers alone: git would have it store what it was told, and forget what a submodule's repository refuses.
      # shellcheck disable=SC2016 # git's shell expands it
      [ -z "$3" ] || git_config credential.helper \
        '!answer() { [ "$1" != get ] || git credential-store --file "$__tr_secret" get; }; answer'
      ;;
  esac
}

# clone URL DIRECTORY BRANCH DEPTH ADDRESS SECRET_FILE KEEP [FOLDER...]: one line of repositories.sh. All but
# the first two may be empty, ADDRESS only of http(s).
clone() {
  echo "[task-runner] cloning $1 into ~/$2"
  (
    guard "$1" "$5" "$6"
    __tr_url=$1 __tr_to=$2 __tr_branch=$3 __tr_depth=$4 __tr_keep=$7 __tr_commit=
    shift 7
    case $__tr_branch in
      refs/heads/*) __tr_branch=${__tr_branch#refs/heads/} ;;
      origin/*) __tr_branch=${__tr_branch#origin/} ;;
      refs/*) __tr_commit=$__tr_branch __tr_branch= ;;
      *[!0-9a-fA-F]*) ;;
      ????????????????????????????????????????) __tr_commit=$__tr_branch __tr_branch= ;;
    esac
    git clone --quiet ${__tr_branch:+--branch "$__tr_branch"} ${__tr_depth:+--depth "$__tr_depth"} \
      ${1+--no-checkout} ${__tr_commit:+--no-checkout} -- "$__tr_url" "$__tr_to" && cd "$__tr_to" || exit
    if [ -n "$__tr_commit" ]; then
      # Older servers give by number only what a branch names: then all that branches name.
      git fetch --quiet ${__tr_depth:+--depth "$__tr_depth"} origin "$__tr_commit" && __tr_commit=FETCH_HEAD ||
        git fetch --quiet --depth 2147483647 origin '+refs/heads/*:refs/remotes/origin/*' || exit
    elif ! git rev-parse --quiet --verify HEAD >/dev/null; then
      __tr_refs=$(git ls-remote origin) || exit
      [ -z "$__tr_refs" ] || {
        echo 'fatal: remote HEAD refers to nonexistent ref, unable to checkout: name one in branch' >&2
        exit 1
      }
      set -- # it is empty, for the task to fill
    fi
    [ $# = 0 ] || git sparse-checkout set "$@" || exit
    [ $# = 0 ] && [ -z "$__tr_commit" ] || git checkout --quiet ${__tr_commit:+--detach "$__tr_commit"} || exit
    [ -z "$__tr_keep" ] || {
      (umask 077 && cat "$__tr_secret" >>"$__tr_home/.git-credentials") &&
        git config credential.helper store &&
        git config credential.useHttpPath true
    } || exit
    complete ''
  ) 2>"$__tr_folder/tmp/git-words"
}

# complete PREFIX: in what was cloned: fetches submodules, and tells what is missing. PREFIX is of paths in the log.
complete() {
  git -c core.quotePath=false grep -lI '^version https://git-lfs.github.com/spec/v' -- ':(attr:filter=lfs)' | {
    __tr_count=0 __tr_first=
    while IFS= read -r __tr_line; do
      __tr_count=$((__tr_count + 1)) __tr_first=${__tr_first:-$__tr_line}
    done
    [ "$__tr_count" = 0 ] || printf '[task-runner] Git LFS files of %s are not fetched: %s, the first is "%s". "git lfs pull" in the task fetches them\n' \
      "$__tr_url" "$__tr_count" "$1$__tr_first"
  }
  [ -f .gitmodules ] && [ ! -h .gitmodules ] || return 0
  git config --file .gitmodules --name-only --get-regexp '^submodule\..*\.path$' |
    while IFS= read -r __tr_key; do submodule "$1" "$__tr_key" </dev/null; done
}

# submodule PREFIX KEY: KEY of .gitmodules holds its path
submodule() (
  # Without its folder, a sparse checkout leaves it out.
  __tr_path=$(git config --file .gitmodules "$2") && [ -d "$__tr_path" ] || exit 0
  __tr_words=$(git submodule --quiet init -- "$__tr_path" 2>&1) && __tr_from=$(git config "${2%.path}.url") &&
    case $(git ls-remote --get-url -- "$__tr_from") in
      "$__tr_origin"/*) __tr_words=$(git submodule --quiet update -- "$__tr_path" 2>&1) ;;
      *)
        __tr_words="only hosts of git_configs are checked. Add one for $__tr_from with local_path \"~/$__tr_to/$1$__tr_path\""
        false
        ;;
    esac && cd "$__tr_path" && {
    [ -z "$__tr_words" ] || printf '%s\n' "$__tr_words" >&2
    complete "$1$__tr_path/"
    exit
  }
  case $__tr_words in *fatal:*) __tr_words=fatal:${__tr_words#*fatal:} ;; esac
  printf '[task-runner] submodule "%s" of %s is not fetched: %s\n' \
    "$1$__tr_path" "$__tr_url" "${__tr_words%%"$__tr_newline"*}"
)

# cloned CODE URL: after each clone; shows git's own words, which are the reason when it failed
cloned() {
  __tr_words=
  while IFS= read -r __tr_line || [ -n "$__tr_line" ]; do
    printf '%s\n' "$__tr_line"
    case $__tr_line in fatal:* | error:*) __tr_words=${__tr_words:-$__tr_line} ;; esac
  done <"$__tr_folder/tmp/git-words"
  [ "$1" = 0 ] && return
  case $__tr_words in
    *'returned error: 30'*) __tr_words="$__tr_words (redirects are not followed: give the final URL)" ;;
  esac
  fail "$__tr_folder" clone "$1" "git clone of $2 failed: ${__tr_words:-exit code $1}"
}

# link_home WORKER_FOLDER TASK_FOLDER: the places that people know from Practicus AI. What is there already stays: an image
# or a mounted disk may have it, and local workers have the links.
link_home() (
  cd "$1/home" || exit
  [ -e my ] || { mkdir -p projects my && ln -s ../projects my/projects; }
  [ -e practicus/task ] && [ "$2" = tasks ] ||
    { mkdir -p practicus && rm -f practicus/task && ln -s "$1/$2" practicus/task; }
)

run() {
  __tr_folder=$1 __tr_stopped=
  # What is at work gets the signal as well, ends in its own way, and its exit code is the task's.
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
      # shellcheck disable=SC2086 # a word for each line
      exec "$__tr_interpreter" $__tr_options "$1/startup.sh"
    )
    __tr_code=$?
    [ "$__tr_code" = 0 ] ||
      fail "$1" startup "$__tr_code" "The startup script failed with exit code $__tr_code"
  fi
  [ -z "$__tr_stopped" ] || fail "$1" task 143 "Stopped before the task ran"
  cd "$1/$2" || fail "$1" startup 1 "The folder of the task is not there"
  # Only of a repository could nobody know before.
  [ "$2" = tasks ] || [ -f "./$3" ] || fail "$1" startup 127 "There is no file \"$3\" in ~/${2#home/}"
  [ "$2" = tasks ] || __tr_is_cloned=1
  choose_interpreter "./$3" "$4" "$5" "$6" "$PATH" "${7-}"
  printf %s "$__tr_notes"
  # shellcheck disable=SC2086 # a word for each line
  "$__tr_interpreter" $__tr_options "./$3"
  __tr_code=$?
  restore_words
  told "$1" || finish "$1" task "$__tr_code"
  exit "$__tr_code"
}

# clock: sets $__tr_now to a time in hundredths of a second
clock() {
  __tr_up=
  read -r __tr_up __tr_idle </proc/uptime
  case $__tr_up in
    *[!0-9.]* | '') __tr_now=$((__tr_now + 10)) ;;
    # A leading 0 would make the fraction an octal number.
    *) __tr_now=$((${__tr_up%%.*} * 100 + 1${__tr_up##*.} - 100)) ;;
  esac
} 2>/dev/null

# others MAX [LOG] [EXCEPT]: succeeds when there are processes beside this one and the container's init, but
# EXCEPT; counts up to MAX in $__tr_count and names the first in $__tr_names. LOG, unless empty: only those that
# can write to the log.
others() {
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
    # Dead, and waiting for a parent that does not look; or gone.
    case $__tr_state in Z* | X* | '') continue ;; esac
    __tr_count=$((__tr_count + 1))
    [ "$__tr_count" -gt 5 ] || {
      # A process calls itself what it wants.
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

# crowded: succeeds when there are so many processes that there may be no room for another. A shell that
# cannot start one ends, so none is started before they have gone.
crowded() {
  set -- /proc/[0-9]*
  [ $# -gt 200 ]
}

# finish_rest: gives what is left its time, ends it, and says so. After TERM that is all there is, until the grace
# period is over; else what may still write to the log, for two seconds: a filter that the log goes through ends
# after the task.
finish_rest() {
  if [ -n "$__tr_sees" ]; then
    clock
    __tr_last=$((__tr_now + 200))
    while :; do
      clock
      if [ -n "$__tr_until" ]; then
        [ "$__tr_now" -lt "$__tr_until" ] && others 1 || break
      else
        [ "$__tr_now" -lt "$__tr_last" ] && ! crowded && others 1 log || break
      fi
      # POSIX has whole seconds alone.
      sleep 0.1 || sleep 1 || break
    done 2>/dev/null
    # One that is ending has closed its files before it is gone.
    [ -n "$__tr_until" ] || crowded || ! others 1 || sleep 0.1 2>/dev/null
    # What stands still neither changes while it is named nor keeps us from it.
    kill -STOP -1 2>/dev/null
    others 100000 '' "$__tr_pid"
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

# recorded: succeeds when the exit file says how the task ended, as the engine is told then
recorded() {
  told "$__tr_folder" || {
    finish "$__tr_folder" task "$__tr_code" 2>/dev/null && told "$__tr_folder"
  } || return
  [ -z "$__tr_message" ] || printf '%s\n' "$__tr_told" >"$__tr_message"
}

contain() {
  __tr_folder=$1 __tr_keep=$2 __tr_message=$3 __tr_grace=$4
  shift 4
  # All there is in a container, but never on a machine that this was started on by mistake.
  __tr_all=0 __tr_init=
  read -r __tr_init </proc/1/comm 2>/dev/null
  case $$:$PPID:$__tr_init in
    1:* | *:1:docker-init | *:1:podman-init | *:1:catatonit) __tr_all=-1 ;;
  esac
  # A /proc of somewhere else would show processes that are not the task's.
  __tr_sees= __tr_until= __tr_now=0 __tr_count=0
  # shellcheck disable=SC3013 # dash and busybox have it
  [ "$__tr_all" = 0 ] || [ ! "/proc/$$" -ef /proc/self ] || __tr_sees=1
  # Our own group is sent the signal as well, which must not come back for ever.
  trap 'trap "" TERM; kill -TERM "$__tr_all" 2>/dev/null; clock; __tr_until=$((__tr_now + __tr_grace / 10))' TERM
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
    [ -z "$__tr_until" ] || finish_rest
  done
  # Before the rest gets its time, which the engine may cut short.
  crowded || recorded
  finish_rest
  # From here on nothing is left that could change the exit file.
  if recorded; then
    if [ -n "$__tr_keep" ]; then
      printf 'over\n' >>"$__tr_folder/exit"
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
