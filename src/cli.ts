#!/usr/bin/env node
/** The command line, a thin layer over the client and `runTask`. */
import { randomUUID } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { basename, dirname } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { type ParseArgsOptionsConfig, parseArgs, styleText } from 'node:util'
import { TaskRunnerApiError, TaskRunnerClient } from './client/client.ts'
import { loadClientConfig } from './config.ts'
import { TaskRunnerError } from './core/errors.ts'
import { WorkerError } from './core/ports.ts'
import { runTask } from './run-task.ts'
import { parseFile } from './wire/worker-config.ts'
import { decodeWorkerFile, encodeWorkerFile, type WorkerConfigInput } from './wire/worker-file.ts'

const HELP = `task-runner: runs scripts on workers

  task-runner serve                  start the service, configured by environment variables
  task-runner run FILE               run a script, print its log, exit with its exit code: on this
                                     machine, or with --url on a service, where FILE is one of
                                     its task files
  task-runner tasks                  list the tasks of a service, newest first
  task-runner logs TASK_ID           print the log of a task; -f follows it until the task ends
  task-runner cancel TASK_ID         cancel a task
  task-runner workers                list the workers of a service
  task-runner cleanup                terminate workers stuck in Provisioning
  task-runner worker-config [FILE]   write a worker file like the Practicus SDK, from JSON in FILE
                                     or on stdin; --decode prints the content of one

Options of run and worker-config:
  --env NAME=VALUE       set an environment variable; repeatable
  --secret NAME          pass a secret in the variable of that name; repeatable
  --size SIZE            X-Small, Small, Medium, Large, X-Large, 2X-Large
  --image IMAGE          container image
  --git URL              clone a repository to ~/projects/<name>; repeatable
  --git-secret NAME      name of the secret with the password of these repositories
Options of run:
  --worker-config FILE   worker file; the options above override it
  --id TASK_ID           with --url: id of the task; running it again with this id starts nothing
  --timeout SECONDS      with --url: maximum run time
  --keep                 keep the worker after the task, for debugging
Options of tasks:
  --status STATUS        queued, provisioning, running, succeeded, failed or cancelled
  --limit N              maximum number of tasks
Options of cleanup:
  --older-than SECONDS   default 59
All commands:
  --url URL              the service; default: TASK_RUNNER_URL, else http://127.0.0.1:3000
  --json                 print JSON (tasks, workers, cancel, cleanup, and the outcome of run)
  --help

The token of the service is read from TASK_RUNNER_TOKEN: other users of the machine can see arguments.

Examples:
  task-runner run tasks/hello.py
  task-runner run tasks/parameters.sh --env MY_FIRST_PARAM=VALUE1 --env MY_SECOND_PARAM=123
  task-runner run parameters.sh --url http://127.0.0.1:3000 --env MY_FIRST_PARAM=a --env MY_SECOND_PARAM=b
`

const OPTIONS = {
  url: { type: 'string' },
  json: { type: 'boolean' },
  help: { type: 'boolean', short: 'h' },
  follow: { type: 'boolean', short: 'f' },
  env: { type: 'string', multiple: true },
  secret: { type: 'string', multiple: true },
  size: { type: 'string' },
  image: { type: 'string' },
  git: { type: 'string', multiple: true },
  'git-secret': { type: 'string' },
  'worker-config': { type: 'string' },
  decode: { type: 'boolean' },
  id: { type: 'string' },
  timeout: { type: 'string' },
  keep: { type: 'boolean' },
  status: { type: 'string' },
  limit: { type: 'string' },
  'older-than': { type: 'string' },
} as const satisfies ParseArgsOptionsConfig

/** A mistake in the command line; printed without a stack. */
class UsageError extends Error {}

type Values = ReturnType<typeof parse>['values']

const CONFIG_OPTIONS = ['env', 'secret', 'size', 'image', 'git', 'git-secret']
/** Commands with their options (except --help) and arguments; optional ones are in brackets. */
const COMMANDS: Record<
  string,
  {
    options: readonly string[]
    arguments: readonly string[]
    run: (given: string[], values: Values) => Promise<number>
  }
> = {
  serve: { options: [], arguments: [], run: serve },
  run: {
    options: ['url', 'json', 'worker-config', 'id', 'timeout', 'keep', ...CONFIG_OPTIONS],
    arguments: ['FILE'],
    run: ([file = ''], values) => (serviceUrl(values) ? runOnService : runLocally)(file, values),
  },
  tasks: { options: ['url', 'json', 'status', 'limit'], arguments: [], run: listTasks },
  logs: { options: ['url', 'follow'], arguments: ['TASK_ID'], run: showLogs },
  cancel: { options: ['url', 'json'], arguments: ['TASK_ID'], run: cancel },
  workers: { options: ['url', 'json'], arguments: [], run: listWorkers },
  cleanup: { options: ['url', 'json', 'older-than'], arguments: [], run: cleanUp },
  'worker-config': {
    options: ['decode', ...CONFIG_OPTIONS],
    arguments: ['[FILE]'],
    run: workerConfig,
  },
}

const interrupted = new AbortController()

async function main(args: string[]): Promise<number> {
  const { values, positionals } = parse(args)
  const [name, ...given] = positionals
  if (values.help || name === undefined || name === 'help') {
    ;(values.help || name ? process.stdout : process.stderr).write(HELP)
    return values.help || name ? 0 : 2
  }
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined
  if (!command) throw new UsageError(`there is no command "${name}"; see task-runner --help`)
  const stray = Object.keys(values).find((option) => !command.options.includes(option))
  if (stray) throw new UsageError(`${name} has no option --${stray}; see task-runner --help`)
  const missing = command.arguments[given.length]
  if (missing && !missing.startsWith('[')) {
    throw new UsageError(`${name}: ${missing} is missing; see task-runner --help`)
  }
  const extra = given[command.arguments.length]
  if (extra !== undefined) throw new UsageError(`${name}: unexpected argument "${extra}"`)
  return command.run(given, values)
}

function parse(args: string[]) {
  try {
    return parseArgs({ args, options: OPTIONS, allowPositionals: true })
  } catch (err) {
    throw new UsageError(err instanceof Error ? err.message : String(err))
  }
}

async function serve(): Promise<number> {
  await import('./main.ts')
  return 0
}

async function runLocally(file: string, values: Values): Promise<number> {
  for (const option of ['id', 'timeout'] as const) {
    if (values[option] !== undefined) throw new UsageError(`--${option} requires --url`)
  }
  onInterrupt()
  const run = await runTask({
    fileName: basename(file),
    filesPath: dirname(file),
    workerConfig: await configFrom(values),
    terminateOnCompletion: !values.keep,
    onLog: (text) => logStream(values).write(text),
    signal: interrupted.signal,
  })
  const { name } = run.worker
  const { success, exitCode, reason, message } = run
  if (values.json) print({ worker: name, success, exit_code: exitCode, reason, message })
  else if (!success) process.stderr.write(`task-runner: ${message ?? reason}\n`)
  if (values.keep) process.stderr.write(`task-runner: the worker is kept: ${name}\n`)
  return exitCode ?? 1
}

async function runOnService(file: string, values: Values): Promise<number> {
  const client = clientFor(values)
  const taskId = values.id ?? `cli-${randomUUID()}`
  onInterrupt(() => client.cancel(taskId))
  const request = {
    task_id: taskId,
    task_file_name: file,
    worker_config: await configFrom(values),
    terminate_on_completion: !values.keep,
    timeout_seconds: values.timeout === undefined ? null : number('timeout', values.timeout),
  }
  await client.submit(request, { traceparent: loadClientConfig().traceparent })
  const onLog = (text: string) => logStream(values).write(text)
  const task = await client.wait(taskId, { onLog, signal: interrupted.signal })
  if (values.json) print(task)
  else if (task.status !== 'succeeded') {
    process.stderr.write(`task-runner: ${task.message ?? task.reason}\n`)
  }
  return task.exit_code ?? (task.status === 'succeeded' ? 0 : 1)
}

async function listTasks(_: string[], values: Values): Promise<number> {
  const list = await clientFor(values).list({
    ...(values.status === undefined ? {} : { status: values.status }),
    ...(values.limit === undefined ? {} : { limit: number('limit', values.limit) }),
  })
  if (values.json) print(list)
  else {
    const isWaiting = list.tasks.some((task) => task.waiting_for !== null)
    const rows = list.tasks.map((task) => [
      task.task_id,
      task.task_file_name,
      task.status,
      task.reason ?? '',
      task.created_at,
      ...(isWaiting ? [task.waiting_for ?? ''] : []),
    ])
    const heads = ['TASK', 'FILE', 'STATUS', 'REASON', 'CREATED']
    table(isWaiting ? [...heads, 'WAITS FOR'] : heads, rows)
  }
  return 0
}

async function showLogs([taskId = '']: string[], values: Values): Promise<number> {
  const client = clientFor(values)
  if (values.follow) {
    onInterrupt()
    await client.wait(taskId, {
      onLog: (text) => process.stdout.write(text),
      signal: interrupted.signal,
    })
  } else process.stdout.write(await client.logs(taskId))
  return 0
}

async function cancel([taskId = '']: string[], values: Values): Promise<number> {
  const result = await clientFor(values).cancel(taskId)
  if (values.json) print(result)
  else process.stdout.write(`${result.message}\n`)
  return 0
}

async function listWorkers(_: string[], values: Values): Promise<number> {
  const workers = await clientFor(values).workers()
  if (values.json) print({ workers })
  else {
    const rows = workers.map((worker) => [
      worker.name,
      worker.status,
      worker.backend,
      worker.task_id,
      worker.creation_time,
    ])
    table(['WORKER', 'STATUS', 'BACKEND', 'TASK', 'CREATED'], rows)
  }
  return 0
}

async function cleanUp(_: string[], values: Values): Promise<number> {
  const given = values['older-than']
  const workers = await clientFor(values).cleanup({
    olderThanSeconds: given === undefined ? undefined : number('older-than', given),
  })
  if (values.json) print({ workers })
  else process.stdout.write([...workers, `Terminated ${workers.length} workers`, ''].join('\n'))
  return 0
}

async function workerConfig([file]: string[], values: Values): Promise<number> {
  const isBare = file === undefined && Object.keys(values).every((option) => option === 'decode')
  const given = file !== undefined || isBare ? await jsonFrom(file) : {}
  const config = { ...given, ...fromOptions(values, given) }
  if (values.decode) print(decodeWorkerFile(config))
  else process.stdout.write(`${encodeWorkerFile(config)}\n`)
  return 0
}

/** Returns the configuration in the worker file of --worker-config, overridden by the options. */
async function configFrom(values: Values): Promise<WorkerConfigInput> {
  const file = values['worker-config']
  const given = file === undefined ? {} : decodeWorkerFile(await jsonFrom(file))
  return { ...given, ...fromOptions(values, given) }
}

function fromOptions(values: Values, under: WorkerConfigInput): WorkerConfigInput {
  const variables = (values.env ?? []).map((text) => {
    const at = text.indexOf('=')
    if (at < 1) throw new UsageError('--env must be NAME=VALUE')
    return [text.slice(0, at), text.slice(at + 1)] as const
  })
  const secret = values['git-secret']
  if (secret !== undefined && !values.git) throw new UsageError('--git-secret requires --git')
  return {
    ...(variables.length > 0
      ? { env_variables: { ...under.env_variables, ...Object.fromEntries(variables) } }
      : {}),
    ...(values.secret ? { personal_secrets: values.secret } : {}),
    ...(values.size === undefined ? {} : { worker_size: values.size }),
    ...(values.image === undefined ? {} : { worker_image: values.image }),
    ...(values.git
      ? {
          git_configs: values.git.map((remote_url) => ({
            remote_url,
            ...(secret === undefined ? {} : { secret_name: secret }),
          })),
        }
      : {}),
  }
}

/** Reads a JSON object from a file, or from stdin if `file` is undefined. */
async function jsonFrom(file: string | undefined): Promise<WorkerConfigInput> {
  const reading = file === undefined ? buffer(process.stdin) : readFile(file)
  const content = await reading.catch((err: NodeJS.ErrnoException) => {
    throw new UsageError(`${file} cannot be read (${err.code})`)
  })
  try {
    return parseFile(content)
  } catch (err) {
    // Safe: parseFile throws errors with messages for people.
    throw new UsageError(`${file ?? 'stdin'} cannot be read: ${(err as Error).message}`)
  }
}

/** Returns the URL of the service, if one is given; without it, `run` runs locally. */
function serviceUrl(values: Values): string | undefined {
  return values.url ?? loadClientConfig().url
}

function clientFor(values: Values): TaskRunnerClient {
  const url = serviceUrl(values) ?? 'http://127.0.0.1:3000'
  if (!/^https?:\/\//.test(url)) throw new UsageError(`--url: "${url}" is not an http(s) URL`)
  return new TaskRunnerClient({ url, token: loadClientConfig().token })
}

/** Ends the command on a signal, or when stdout is closed. */
let interrupt = (): void => process.exit(0)

/** Makes an interrupt call `end` and abort `interrupted`, once. */
function onInterrupt(end: () => Promise<unknown> = async () => {}): void {
  interrupt = () => {
    // Further interrupts are ignored: a worker that does not stop is killed after its grace period.
    interrupt = () => {}
    end()
      .catch((err: unknown) => process.stderr.write(`task-runner: ${explain(err)}\n`))
      .finally(() => interrupted.abort())
  }
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(name, () => interrupt())
}

/** Returns where to print the log: with --json, stdout is reserved for the outcome. */
function logStream(values: Values): NodeJS.WriteStream {
  return values.json ? process.stderr : process.stdout
}

function number(option: string, text: string): number {
  if (!/^\d+(\.\d+)?$/.test(text)) throw new UsageError(`--${option} must be a number`)
  return Number(text)
}

function print(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`)
}

const COLOURS: Partial<Record<string, 'green' | 'red' | 'yellow'>> = {
  succeeded: 'green',
  failed: 'red',
  cancelled: 'yellow',
}

function table(head: string[], rows: string[][]): void {
  const widths = head.map((title, column) =>
    Math.max(title.length, ...rows.map((row) => row[column]?.length ?? 0)),
  )
  for (const row of [head, ...rows]) {
    const cells = row.map((cell, column) => {
      const padded = column === row.length - 1 ? cell : cell.padEnd(widths[column] ?? 0)
      // Task ids are chosen by callers and may contain control sequences for the terminal.
      const plain = padded.replace(/[^\P{Cc}]/gu, '?')
      const style = row === head ? 'bold' : COLOURS[cell]
      return style ? styleText(style, plain) : plain
    })
    process.stdout.write(`${cells.join('  ')}\n`)
  }
}

/** Returns the message of an error, with all invalid fields. */
function explain(err: unknown): string {
  if (err instanceof TaskRunnerApiError && err.errors.length > 0) {
    return [
      'the service rejected the request:',
      ...err.errors.map((one) => `  ${one.path}: ${one.message}`),
    ].join('\n')
  }
  if (err instanceof TaskRunnerApiError && err.code === 'unauthorized') {
    return `${err.message}. Set TASK_RUNNER_TOKEN to one of the tokens of the service.`
  }
  const isKnown = [TaskRunnerApiError, TaskRunnerError, WorkerError, UsageError].some(
    (kind) => err instanceof kind,
  )
  if (isKnown && err instanceof Error) return err.message
  return err instanceof Error ? (err.stack ?? err.message) : String(err)
}

// The reader of the pipe has closed it, such as head(1).
process.stdout.on('error', () => interrupt())
try {
  process.exitCode = await main(process.argv.slice(2))
} catch (err) {
  // 130 is the exit code that shells report for Ctrl-C.
  if (interrupted.signal.aborted) process.exitCode = 130
  else {
    process.exitCode = err instanceof UsageError ? 2 : 1
    process.stderr.write(`task-runner: ${explain(err)}\n`)
  }
}
