/** What README tells people to type, typed: only the address of the service is another one. */
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { testEnv } from './helpers/app.ts'
import { needs } from './helpers/needs.ts'
import { type Service, startService } from './helpers/service.ts'

const ROOT = new URL('..', import.meta.url).pathname
const SERVICE = 'http://127.0.0.1:3000'

let folder: string
let service: Service
let readme: string
beforeAll(async () => {
  readme = await readFile(join(ROOT, 'README.md'), 'utf8')
  folder = await mkdtemp(join(tmpdir(), 'readme-test-'))
  const env = { DATA_DIR: join(folder, 'data'), TASKS_DIR: join(ROOT, 'tasks') }
  service = await startService(env)
})
afterAll(async () => {
  await service.kill('SIGTERM')
  await rm(folder, { recursive: true, force: true })
})

/** The code of a language below a heading. */
function blocks(heading: string, language: string): string[] {
  const section = readme.split(/^## /m).find((each) => each.startsWith(`${heading}\n`))
  if (section === undefined) throw new Error(`README has no section "${heading}"`)
  const found = section.matchAll(new RegExp(`^( *)\`\`\`${language}\n([^]*?)^ *\`\`\``, 'gm'))
  return [...found].map(([, , code = '']) => code.replaceAll(SERVICE, service.url))
}

/** `npx task-runner` without npm, which would take its time. */
const NPX = `npx() { shift; '${process.execPath}' dist/cli.js "$@"; }\n`

async function shell(code: string) {
  const env = testEnv({ TASK_RUNNER_URL: service.url, HOME: folder })
  // Holds: a command that fails rejects with what it wrote.
  const run = promisify(execFile)('/bin/bash', ['-euc', NPX + code], { cwd: ROOT, env })
  return run.catch((err: { stdout: string; stderr: string; code: number }) => err)
}

needs('curl')('Use it: the task runs, and everything about it is answered', async () => {
  const [, curls = ''] = blocks('Use it', 'sh')
  const { stdout } = await shell(curls)
  expect(stdout).toContain('"message":"Started Task successfully"')
  expect(stdout).toContain('event: end\ndata: {"status":"succeeded","reason":"completed"}')
  expect(stdout).not.toContain('"success":false')
})

test('Coming from Practicus AI: the worker file is the one that is shown', async () => {
  const [code = ''] = blocks('Coming from Practicus AI', 'sh')
  const shown = /# (\{.*\})/.exec(code)?.[1]
  expect(shown).toBeDefined()
  expect((await shell(code)).stdout).toBe(`${shown}\n`)
})

needs('curl', 'jq')('From Jenkins or GitLab: the script shows the log of the task', async () => {
  const [code = ''] = blocks('From Jenkins or GitLab', 'sh')
  expect((await shell(code)).stdout).toMatch(/^Hello from Python 3\S*, task build-\d+\n$/)
})

test('From code: a task on a service, and one on this machine', async () => {
  const [code = ''] = blocks('From code', 'js')
  const script = join(ROOT, 'dist/readme.mjs')
  await writeFile(script, code)
  const { stdout } = await shell(`'${process.execPath}' dist/readme.mjs`)
  await rm(script)
  expect(stdout).toMatch(
    /^Hello from Python .*, task from-code-1\nsucceeded 0\nMY_FIRST_PARAM=VALUE1\nMY_SECOND_PARAM=123\ntrue 0\n$/,
  )
})

test('From the shell: each line does what is said beside it', async () => {
  const [code = ''] = blocks('From the shell', 'sh')
  const [here = '', there = '', tasks = '', help = ''] = code.trim().split('\n')
  expect((await shell(here.replace('npx', 'unset TASK_RUNNER_URL; npx'))).stdout).toMatch(
    /^Hello from Python .*, task run-/,
  )
  expect((await shell(there)).stdout).toMatch(/^Hello from Python .*, task cli-/)
  expect((await shell(tasks)).stdout).toMatch(/^TASK +FILE/)
  expect((await shell(help)).stdout).toContain('task-runner serve')
})

test('every file that README leads to is there', async () => {
  const links = [...readme.matchAll(/\]\((?!https?:)([^)#]+)\)/g)].map(([, path = '']) => path)
  expect(links.length).toBeGreaterThan(8)
  const missing = await Promise.all(
    links.map((path) => shell(`test -e '${path}' || echo '${path}'`).then(({ stdout }) => stdout)),
  )
  expect(missing.join('')).toBe('')
})
