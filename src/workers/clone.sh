# Functions of bootstrap.sh that clone repositories. They stand on top of each repositories.sh, so
# that only workers with repositories get them. Needs git 2.31; from 2.37 on, addresses are pinned.

# git_config KEY VALUE: configures each git command of this shell, and the commands git starts
# itself
git_config() {
  export "GIT_CONFIG_KEY_$GIT_CONFIG_COUNT=$1" "GIT_CONFIG_VALUE_$GIT_CONFIG_COUNT=$2"
  export GIT_CONFIG_COUNT=$((GIT_CONFIG_COUNT + 1))
}

# restrict_git URL ADDRESS SECRET_FILE: lets the git commands of this shell connect to the URL's
# host only, and sets $__tr_origin to the scheme and host of the URL. ADDRESS, unless empty, pins
# the host to the address that the service has checked.
restrict_git() {
  # The task's variables must not change how git clones.
  unset GIT_CONFIG_PARAMETERS GIT_TRACE GIT_TRACE_CURL GIT_CURL_VERBOSE GIT_TRACE_REDACT
  unset GIT_DIR GIT_WORK_TREE
  __tr_host=${1#*://}
  __tr_host=${__tr_host%%/*}
  __tr_origin=${1%%://*}://$__tr_host
  __tr_host=${__tr_host#*@}
  __tr_host=${__tr_host%:[0-9]*}
  # Nobody can answer a prompt. Git LFS would connect to hosts that were not checked.
  export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true GIT_LFS_SKIP_SMUDGE=1
  export GIT_ALLOW_PROTOCOL="${1%%://*}" GIT_CONFIG_COUNT=0
  export __tr_secret="$3" __tr_home="$__tr_folder/home"
  # A redirect could lead to an address that was not checked.
  git_config http.followRedirects false
  # A server that sends nothing for 30 s is taken for down.
  git_config http.lowSpeedLimit 1
  git_config http.lowSpeedTime 30
  git_config http.curloptResolve "$2"
  git_config credential.helper ''
  # URLs of submodules: other spellings of the host become the host, and every other URL is invalid.
  for __tr_spelling in "$__tr_origin/" "git@$__tr_host:" "ssh://git@$__tr_host/" \
    "https://$__tr_host/"; do
    git_config "url.$__tr_origin/.insteadOf" "$__tr_spelling"
  done
  for __tr_spelling in http:// https:// http:: https::; do
    git_config url.unchecked://.insteadOf "$__tr_spelling"
  done
  case $1 in
    ssh:*)
      # Ignores the configuration and keys of the user that the worker runs as. Changes the folder
      # first: git starts ssh for a submodule in the submodule's folder.
      # shellcheck disable=SC2016 # git's shell expands it
      __tr_ssh='cd "$__tr_home" && ssh -F none -o BatchMode=yes -o LogLevel=ERROR'
      __tr_ssh="$__tr_ssh -o IdentitiesOnly=yes -o IdentityAgent=none"
      __tr_ssh="$__tr_ssh -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=2"
      __tr_ssh="$__tr_ssh -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=.ssh/known_hosts"
      __tr_ssh="$__tr_ssh -o HostName=${2#*=} -o HostKeyAlias=${2%%=*}"
      # shellcheck disable=SC2016 # git's shell expands it
      [ -n "$3" ] && __tr_ssh="$__tr_ssh"' -i "$__tr_secret"' || __tr_ssh="$__tr_ssh -o IdentityFile=none"
      export GIT_SSH_COMMAND="$__tr_ssh" GIT_SSH_VARIANT=ssh
      mkdir -p "$__tr_home/.ssh"
      ;;
    *)
      # Only `get` is passed on: git would also store credentials, and erase them when the
      # repository of a submodule rejects them.
      # shellcheck disable=SC2016 # git's shell expands it
      [ -z "$3" ] || git_config credential.helper \
        '!answer() { [ "$1" != get ] || git credential-store --file "$__tr_secret" get; }; answer'
      ;;
  esac
}

# clone URL DIRECTORY BRANCH DEPTH ADDRESS SECRET_FILE KEEP [FOLDER...]: clones one repository. All
# but the first two may be empty, ADDRESS only with http(s). KEEP: keeps the credential for the
# task.
clone() {
  echo "[task-runner] cloning $1 into ~/$2"
  (
    restrict_git "$1" "$5" "$6"
    __tr_url=$1 __tr_to=$2 __tr_branch=$3 __tr_depth=$4 __tr_keep=$7 __tr_commit=
    shift 7
    case $__tr_branch in
      refs/heads/*) __tr_branch=${__tr_branch#refs/heads/} ;;
      origin/*) __tr_branch=${__tr_branch#origin/} ;;
      refs/*) __tr_commit=$__tr_branch __tr_branch= ;;
      *[!0-9a-fA-F]*) ;;
      ????????????????????????????????????????) __tr_commit=$__tr_branch __tr_branch= ;;
    esac
    git clone --quiet ${__tr_branch:+--branch "$__tr_branch"} \
      ${__tr_depth:+--depth "$__tr_depth"} ${1+--no-checkout} ${__tr_commit:+--no-checkout} \
      -- "$__tr_url" "$__tr_to" && cd "$__tr_to" || exit
    if [ -n "$__tr_commit" ]; then
      # Older servers send a commit only as part of a branch: then all branches are fetched.
      git fetch --quiet ${__tr_depth:+--depth "$__tr_depth"} origin "$__tr_commit" &&
        __tr_commit=FETCH_HEAD ||
        git fetch --quiet --depth 2147483647 origin '+refs/heads/*:refs/remotes/origin/*' || exit
    elif ! git rev-parse --quiet --verify HEAD >/dev/null; then
      __tr_refs=$(git ls-remote origin) || exit
      [ -z "$__tr_refs" ] || {
        echo 'fatal: remote HEAD refers to nonexistent ref, unable to checkout: name one in branch' >&2
        exit 1
      }
      set -- # the repository is empty: there is nothing to check out
    fi
    [ $# = 0 ] || git sparse-checkout set "$@" || exit
    [ $# = 0 ] && [ -z "$__tr_commit" ] ||
      git checkout --quiet ${__tr_commit:+--detach "$__tr_commit"} || exit
    [ -z "$__tr_keep" ] || {
      (umask 077 && cat "$__tr_secret" >>"$__tr_home/.git-credentials") &&
        git config credential.helper store &&
        git config credential.useHttpPath true
    } || exit
    complete_checkout ''
  ) 2>"$__tr_folder/tmp/git-errors"
}

# complete_checkout PREFIX: fetches the submodules of the repository in the current folder, and
# reports what is missing from it. PREFIX is put before paths in the log.
complete_checkout() {
  git -c core.quotePath=false grep -lI '^version https://git-lfs.github.com/spec/v' \
    -- ':(attr:filter=lfs)' | {
    __tr_count=0 __tr_first=
    while IFS= read -r __tr_line; do
      __tr_count=$((__tr_count + 1)) __tr_first=${__tr_first:-$__tr_line}
    done
    [ "$__tr_count" = 0 ] || printf '[task-runner] Git LFS files of %s are not fetched: %s, the first is "%s". %s\n' \
      "$__tr_url" "$__tr_count" "$1$__tr_first" '"git lfs pull" in the task fetches them'
  }
  [ -f .gitmodules ] && [ ! -h .gitmodules ] || return 0
  git config --file .gitmodules --name-only --get-regexp '^submodule\..*\.path$' |
    while IFS= read -r __tr_key; do fetch_submodule "$1" "$__tr_key" </dev/null; done
}

# fetch_submodule PREFIX KEY: fetches the submodule whose path is the value of KEY in .gitmodules
fetch_submodule() (
  # A sparse checkout that leaves the submodule out has no folder for it.
  __tr_path=$(git config --file .gitmodules "$2") && [ -d "$__tr_path" ] || exit 0
  __tr_error=$(git submodule --quiet init -- "$__tr_path" 2>&1) &&
    __tr_from=$(git config "${2%.path}.url") &&
    case $(git ls-remote --get-url -- "$__tr_from") in
      "$__tr_origin"/*) __tr_error=$(git submodule --quiet update -- "$__tr_path" 2>&1) ;;
      *)
        __tr_error="only hosts of git_configs are checked."
        __tr_error="$__tr_error Add one for $__tr_from with local_path \"~/$__tr_to/$1$__tr_path\""
        false
        ;;
    esac && cd "$__tr_path" && {
    [ -z "$__tr_error" ] || printf '%s\n' "$__tr_error" >&2
    complete_checkout "$1$__tr_path/"
    exit
  }
  case $__tr_error in *fatal:*) __tr_error=fatal:${__tr_error#*fatal:} ;; esac
  printf '[task-runner] submodule "%s" of %s is not fetched: %s\n' \
    "$1$__tr_path" "$__tr_url" "${__tr_error%%"$__tr_newline"*}"
)

# check_clone CODE URL: shows what git printed; ends the task with git's first error if the clone
# failed
check_clone() {
  __tr_error=
  while IFS= read -r __tr_line || [ -n "$__tr_line" ]; do
    printf '%s\n' "$__tr_line"
    case $__tr_line in fatal:* | error:*) __tr_error=${__tr_error:-$__tr_line} ;; esac
  done <"$__tr_folder/tmp/git-errors"
  [ "$1" = 0 ] && return
  case $__tr_error in
    *'returned error: 30'*)
      __tr_error="$__tr_error (redirects are not followed: give the final URL)"
      ;;
  esac
  fail "$__tr_folder" clone "$1" "git clone of $2 failed: ${__tr_error:-exit code $1}"
}

