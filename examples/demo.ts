/**
 * Shows the main job on this machine: starts the service on loopback with a fresh data folder, posts a task
 * whose callback comes back to the service's own sample receiver, and prints what happens as it happens.
 * `--once` ends then, with exit code 0 when all went well; otherwise it stays up for a look around.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as pause } from 'node:timers/promises'

const TASK = {
  task_id: 'demo-1',
  task_file_name: 'progress.sh',
  worker_config: { env_variables: { STEPS: 3 } },
  callback_url: '',
  callback_url_token: 'demo-token',
  terminate_on_completion: true,
}
const start = Date.now()

const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-demo-'))
const service = spawn(process.execPath, ['src/main.ts'], {
  cwd: new URL('..', import.meta.url),
  env: { PORT: '0', ...process.env, HOST: '127.0.0.1', DATA_DIR: dataDir, LOG_LEVEL: 'info' },
  stdio: ['ignore', 'pipe', 'inherit'],
})
const listening = Promise.withResolvers<string>()
const received = Promise.withResolvers<Record<string, unknown>>()
createInterface(service.stdout).on('line', (line) => {
  const entry = JSON.parse(line) as Record<string, unknown>
  if (entry.msg === 'listening') listening.resolve(String(entry.address))
  if (entry.msg === 'sample callback received') received.resolve(entry)
})
service.once('exit', (code) => {
  listening.reject(new Error(`the service ended with code ${code}`))
  received.reject(new Error(`the service ended with code ${code}`))
})
const base = await listening.promise
say('service', `listening on ${base}, data in ${dataDir}`)

process.once('SIGINT', () => void end(0))
try {
  await show()
  if (process.argv.includes('--once')) await end(0)
  console.log(`
Web page:   ${base}/
Swagger UI: ${base}/docs
The task:   ${base}/tasks/${TASK.task_id}
Its log:    ${base}/tasks/${TASK.task_id}/logs
Press Ctrl-C to stop.`)
} catch (err) {
  console.error(err)
  await end(1)
}

async function show(): Promise<void> {
  const task = { ...TASK, callback_url: `${base}/sample-task-runner-callback` }
  const accepted = await fetch(`${base}/task-runner/`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(task),
  })
  say('answer', `${accepted.status} ${await accepted.text()}`)
  if (!accepted.ok) throw new Error('the task was not accepted')

  await until(async () => (await get(`/tasks/${TASK.task_id}`)).status === 'running')
  const { worker_name: worker } = await get(`/tasks/${TASK.task_id}`)
  say('task', `running on worker ${worker}`)
  await followLog()

  const { taskName, taskId, success, logs } = await received.promise
  say(
    'callback',
    `received: ${JSON.stringify({ task_name: taskName, task_id: taskId, success, logs })}`,
  )
  await until(async () => (await fetch(`${base}/workers/${worker}`)).status === 404)
  say('worker', 'terminated')
  const { status, reason, callback_status: delivery } = await get(`/tasks/${TASK.task_id}`)
  say('task', `${status} (${reason}), callback ${delivery}`)
  if (success !== true) throw new Error('the task did not succeed')
}

/** Prints the log line by line until the service says that the task has ended. */
async function followLog(): Promise<void> {
  const events = await fetch(`${base}/tasks/${TASK.task_id}/logs?follow=true`)
  let text = ''
  for await (const chunk of events.body ?? []) {
    text += new TextDecoder().decode(chunk)
    const whole = text.split('\n\n')
    text = whole.pop() ?? ''
    for (const event of whole) {
      if (event.startsWith('event: end')) return
      for (const [, line] of event.matchAll(/^data: (.+)$/gm)) say('log', line ?? '')
    }
  }
}

async function get(path: string): Promise<Record<string, unknown>> {
  return (await (await fetch(base + path)).json()) as Record<string, unknown>
}

async function until(reached: () => Promise<boolean>): Promise<void> {
  while (!(await reached())) await pause(20)
}

function say(what: string, text: string): void {
  const seconds = ((Date.now() - start) / 1000).toFixed(2).padStart(6)
  console.log(`${seconds} s  ${what.padEnd(8)}  ${text}`)
}

async function end(code: number): Promise<never> {
  if (service.exitCode === null) {
    const exited = once(service, 'exit')
    service.kill('SIGTERM')
    await exited
  }
  await rm(dataDir, { recursive: true, force: true })
  process.exit(code)
}
