import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

/** This project's service, as a process on a free port with a data folder of its own. */
export async function startOwnService(token: string) {
  const root = fileURLToPath(new URL('../..', import.meta.url))
  const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-conformance-'))
  const child = spawn(process.execPath, ['src/main.ts'], {
    cwd: root,
    env: {
      PATH: process.env.PATH,
      HOST: '127.0.0.1',
      PORT: '0',
      DATA_DIR: dataDir,
      TASKS_DIR: join(root, 'tasks'),
      API_TOKENS: token,
      LOG_LEVEL: 'info',
      PYTHON_COMMAND: '/usr/bin/python3',
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const ended = once(child, 'exit')
  const listening = Promise.withResolvers<string>()
  const said: string[] = []
  createInterface(child.stderr).on('line', (line) => said.push(line))
  createInterface(child.stdout).on('line', (line) => {
    said.push(line)
    if (line.includes('"msg":"listening"')) listening.resolve(JSON.parse(line).address)
  })
  child.once('exit', () => {
    listening.reject(new Error(`the service ended before it listened:\n${said.join('\n')}`))
  })
  return {
    url: await listening.promise,
    stop: async () => {
      child.kill('SIGTERM')
      await ended
      await rm(dataDir, { recursive: true, force: true })
    },
  }
}
