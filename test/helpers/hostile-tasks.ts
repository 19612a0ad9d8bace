/** Tasks that attack their worker, their log, the service and what is left of them, and ordinary ones beside them. */
import { ODD_THINGS, oddScript, PLACES } from './odd-worker-folders.ts'

export type HostileBackend = 'local' | 'docker'

export interface HostileTask {
  kind: string
  script: string
  /** How it may end: `<status> <reason>`. Whatever it does, no trouble of ours is its outcome. */
  mayEnd: RegExp
  /** Further fields of its request. */
  request?: Record<string, unknown>
}

interface Kind {
  name: string
  make(random: () => number): Omit<HostileTask, 'kind'>
  /** Default: both. */
  on?: HostileBackend
  /** How many there may be of a run; default: any number. */
  max?: number
}

const OWN_EXIT = /^failed exit_code$/
const LOST = /^failed (exit_code|signal|worker_lost)$/
const TIMED_OUT = /^failed timed_out$/
const OVER_LOG_LIMIT = /^failed log_limit$/
/** Killed while it ends a worker at a limit, the service finds what its signal made of it. */
const ENDED_OR_LOST = /^failed (timed_out|log_limit|signal|worker_lost)$/
/** What becomes of one that breaks what its outcome is read from. */
const BROKEN = /^failed (exit_code|signal|worker_lost|log_limit)$/
const FOLDER = 'folder=$(cd "$HOME/.." && pwd); cd /'
/** Fields 4, 5 and 6: parent, process group and session. */
const STAT = 'read -r _ _ _ parent group session _ </proc/$$/stat'
const REPETITIVE_TOKENS = ['aaaaaa', 'a'.repeat(4096), 'ab'.repeat(2048)]

const pick = <T>(items: readonly T[], random: () => number): T =>
  // Holds: random() is below 1, and no list here is empty.
  items[Math.floor(random() * items.length)] as T

const plain = (
  name: string,
  script: string,
  mayEnd = OWN_EXIT,
  more: Partial<Kind> & { request?: Record<string, unknown> } = {},
): Kind => {
  const { request, ...rest } = more
  return { name, make: () => ({ script, mayEnd, ...(request && { request }) }), ...rest }
}

/**
 * What a task leaves running, each in a session of its own. The word of the run stands in their command line, so
 * that a test finds them however they hide from the service.
 */
const leftovers = (mark: string): Kind[] => [
  plain('leaves a session', `setsid sh -c 'sleep 1000; : ${mark}' >/dev/null 2>&1 & exit 3`),
  plain(
    'leaves a session without an environment',
    `env -i setsid sh -c 'sleep 1000; : ${mark}' >/dev/null 2>&1 & exit 3`,
  ),
  plain(
    'leaves a session elsewhere, with a HOME of its own',
    `cd /; cd /usr; setsid sh -c 'sleep 1000; : ${mark}' >/dev/null 2>&1 & exit 3`,
    OWN_EXIT,
    { request: { env_variables: { HOME: '/', TMPDIR: '/tmp' } } },
  ),
  plain(
    'leaves two hundred processes',
    `i=0; while [ $i -lt 200 ]; do sh -c 'sleep 1000; : ${mark}' >/dev/null 2>&1 & i=$((i + 1)); done; exit 3`,
  ),
  plain(
    'leaves one that ignores TERM',
    `setsid sh -c 'trap "" TERM; while :; do sleep 1; done; : ${mark}' >/dev/null 2>&1 & exit 3`,
  ),
  plain(
    'leaves a writer of its log',
    `setsid sh -c 'trap "" TERM; while sleep 0.01; do echo ${mark}; done' & exit 3`,
  ),
]

const logs: Kind[] = [
  plain('floods its log', 'cat /dev/zero', OVER_LOG_LIMIT),
  plain('floods its log and ignores TERM', "trap '' TERM; cat /dev/zero", OVER_LOG_LIMIT),
  plain(
    'floods its log from a session of its own',
    "setsid sh -c 'trap \"\" TERM; exec cat /dev/zero' & trap '' TERM; wait; sleep 1000",
    OVER_LOG_LIMIT,
  ),
  plain('floods its log with lines', 'yes "a line of a task that has much to say"', OVER_LOG_LIMIT),
  ...['truncate -s 0', 'truncate -s 900G', 'rm -f', 'chmod 000'].map((command) =>
    plain(
      `${command} log`,
      `${FOLDER}; echo before; ${command} "$folder/log"; echo after; exit 3`,
      BROKEN,
    ),
  ),
  plain(
    'writes far into its log',
    `${FOLDER}; dd if=/dev/zero of="$folder/log" bs=1 count=1 seek=40G; exit 3`,
    BROKEN,
  ),
  plain('closes its output', 'exec >&- 2>&-; exit 3'),
  plain('writes bytes that are no text', 'head -c 300000 /dev/urandom; exit 3'),
  plain('writes a line of five million letters', 'head -c 5242880 /dev/zero | tr "\\0" x; exit 3'),
  {
    name: 'repeats a repetitive token',
    make: (random) => ({
      script: `head -c 5242880 /dev/zero | tr "\\0" ${pick(['a', 'b'], random)}; exit 3`,
      mayEnd: OWN_EXIT,
      request: { callback_url_token: pick(REPETITIVE_TOKENS, random) },
    }),
  },
]

const processes: Kind[] = [
  plain('kills its own group', 'kill -KILL 0; sleep 1000', LOST),
  plain('kills its parent', `${STAT}; kill -KILL "$parent"; sleep 1; exit 3`, LOST),
  plain(
    'kills the group of its slot shell',
    // Nothing but a slot shell: a session of anybody else's would go with all that runs in it.
    `${STAT}; case $(tr '\\0' ' ' <"/proc/$session/cmdline") in '/bin/sh -s'*) kill -KILL -- "-$session" ;; esac; exit 3`,
    LOST,
    { on: 'local' },
  ),
  plain('stops itself', 'kill -STOP $$; exit 3', TIMED_OUT, {
    request: { timeout_seconds: 2 },
  }),
  plain(
    'stops its parent',
    `${STAT}; kill -STOP "$parent"; exit 3`,
    /^failed (exit_code|timed_out|signal|worker_lost)$/,
    {
      request: { timeout_seconds: 2 },
    },
  ),
  plain('outlasts its time', "trap '' TERM; while :; do sleep 1; done", TIMED_OUT, {
    request: { timeout_seconds: 1 },
  }),
  plain('kills all that it sees', 'kill -KILL -1; exit 3', LOST, { on: 'docker' }),
  plain('kills the first process', 'kill -KILL 1; exit 3', LOST, { on: 'docker' }),
  plain('is a fork bomb', 'bomb() { bomb | bomb & }; bomb; sleep 1000', /^failed /, {
    on: 'docker',
    max: 1,
    request: { timeout_seconds: 3, worker_size: 'X-Small' },
  }),
]

const files: Kind[] = [
  plain('locks its home', `mkdir -p "$HOME/in/it"; chmod 000 "$HOME/in" "$HOME"; exit 3`),
  plain('locks its folder', `${FOLDER}; chmod 000 "$folder"; exit 3`, BROKEN),
  plain(
    'digs a deep tree',
    `cd "$HOME"; i=0; name=$(printf '%0200d' 1); while [ $i -lt 300 ]; do mkdir $name && cd $name || break; i=$((i + 1)); done; exit 3`,
  ),
  plain(
    'makes many files with odd names',
    `cd "$HOME"; i=0; while [ $i -lt 2000 ]; do : >"$(printf 'n\\351 \\n%s' $i)"; i=$((i + 1)); done; : >-rf; exit 3`,
  ),
  plain(
    'fills its folders with odd files',
    `for at in "$HOME" "$TMPDIR"; do mkfifo "$at/pipe"; ln -s . "$at/loop"; ln -s / "$at/root"; ln "$0" "$at/hard" 2>/dev/null; done; exit 3`,
  ),
  plain(
    'changes its copy of the tasks folder',
    `${FOLDER}; rm -rf "$folder"/tasks/*; ln -s /etc "$folder/tasks/etc"; mkfifo "$folder/tasks/w-eval.sh"; exit 3`,
  ),
  plain(
    'leaves something beside its folder',
    `${FOLDER}; : >"$folder/../stray-$TASK_ID"; exit 3`,
    OWN_EXIT,
    {
      on: 'local',
    },
  ),
  plain(
    'swells its exit file',
    `${FOLDER}; echo task 0 >"$folder/exit"; truncate -s 1500M "$folder/exit"; exit 3`,
    /^(failed|succeeded) /,
  ),
]

const oddFolders: Kind[] = PLACES.map((place) => ({
  name: `odd: ${place}`,
  make(random) {
    const thing = pick(ODD_THINGS, random)
    return { script: oddScript(thing, place), mayEnd: BROKEN }
  },
}))

/** `count` hostile tasks: each kind once, the rest drawn. Odd things in the worker's folder come as often as all others. */
export function hostileTasks(
  count: number,
  { backend, mark, random }: { backend: HostileBackend; mark: string; random: () => number },
): HostileTask[] {
  const usable = (kinds: Kind[]) => kinds.filter(({ on }) => on === undefined || on === backend)
  const others = usable([...leftovers(mark), ...logs, ...processes, ...files])
  const all = [...oddFolders, ...others]
  const made = new Map<Kind, number>()
  const task = (kind: Kind): HostileTask => {
    made.set(kind, (made.get(kind) ?? 0) + 1)
    const given = { kind: kind.name, ...kind.make(random) }
    const isEndedByUs = [TIMED_OUT, OVER_LOG_LIMIT].includes(given.mayEnd)
    return isEndedByUs ? { ...given, mayEnd: ENDED_OR_LOST } : given
  }
  const tasks = all.slice(0, count).map(task)
  while (tasks.length < count) {
    const kind = pick(random() < 0.5 ? oddFolders : others, random)
    if ((made.get(kind) ?? 0) < (kind.max ?? Number.POSITIVE_INFINITY)) tasks.push(task(kind))
  }
  return tasks
}

export interface OrdinaryTask {
  file: 'w-eval.sh' | 'w-eval.py'
  script: string
  exitCode: number
  log: string
}

/** A task that does nothing wrong, and notes in the file $RUNS that it ran. */
export function ordinaryTask(taskId: string, random: () => number): OrdinaryTask {
  const note = 'echo "$TASK_ID" >>"$RUNS"'
  const code = pick([0, 0, 0, 1, 42, 255], random)
  const lines = 1 + Math.floor(random() * 2_000)
  const counted = (to: number) =>
    Array.from({ length: to }, (_, index) => `${index + 1}\n`).join('')
  const shell = (script: string, log: string): OrdinaryTask => ({
    ...{ file: 'w-eval.sh', script: `${note}; ${script}; exit ${code}`, exitCode: code, log },
  })
  return pick<() => OrdinaryTask>(
    [
      () => shell('echo "ran $TASK_ID"', `ran ${taskId}\n`),
      () => shell(`seq ${lines}`, counted(lines)),
      () => shell('seq 100000', counted(100_000)),
      () => shell('echo one; sleep 0.3; echo two >&2; sleep 0.3; echo three', 'one\ntwo\nthree\n'),
      () => shell('echo kept >"$HOME/kept"; cat "$HOME/kept"; ls -A "$TMPDIR"', 'kept\n'),
      () => ({
        file: 'w-eval.py',
        script: `import os, sys\nopen(os.environ["RUNS"], "a").write(os.environ["TASK_ID"] + "\\n")\nfor i in range(${lines}): print(i + 1)\nsys.exit(${code})`,
        exitCode: code,
        log: counted(lines),
      }),
    ],
    random,
  )()
}
