/** Receivers on FastAPI, with and without a token, and signatures checked by the library of Standard Webhooks. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { eventually, get, type Stage, startStage } from '../../helpers/recovery.ts'
import type { Service } from '../../helpers/service.ts'
import { installed } from '../clients.ts'

const TOKEN = '12|abc.DEF-123_~+/='
const SIGNING_SECRET = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'
const PATHS = ['/model', '/token', '/any', '/signed'] as const

let receivers: { url: string; [Symbol.asyncDispose](): Promise<void> }
let stage: Stage
let service: Service

beforeAll(async () => {
  receivers = await startReceivers()
  stage = await startStage({ env: { CALLBACK_SIGNING_SECRETS: SIGNING_SECRET } })
  service = await stage.start()
})

afterAll(async () => {
  await stage?.[Symbol.asyncDispose]()
  await receivers?.[Symbol.asyncDispose]()
})

const CASES = {
  success: { script: 'echo done', success: true, logs: 'done\n' },
  failure: { script: 'echo broken; exit 3', success: false, logs: 'broken\n' },
  unicode: {
    script: 'echo "Günaydın 🌍 \\"q\\" \\\\"',
    success: true,
    logs: 'Günaydın 🌍 "q" \\\n',
  },
  '6 MB': {
    script: 'yes 0123456789abcdef | head -c 6000000; echo; echo end',
    success: true,
    logs: expect.stringMatching(/^\[task-runner\] \d+ bytes .*\nend\n$/s),
  },
}

test.each(
  Object.entries(CASES).flatMap(([name, each]) => PATHS.map((path) => ({ name, path, ...each }))),
)('$name reaches $path', async ({ name, path, script, success, logs }) => {
  const taskId = `${name} at ${path}`
  await stage.submit(service, taskId, 'w-eval.sh', {
    env: { SCRIPT: script },
    callback_url: receivers.url + path,
    callback_url_token: path === '/token' ? TOKEN : '',
  })
  const callback = await callbackAt(path, taskId)
  expect(callback).toEqual({ path, task_name: 'w-eval.sh', task_id: taskId, success, logs })
})

test('a receiver that wants another token is told of as refusing, and is called again', async () => {
  await stage.submit(service, 'wrong', 'w-eval.sh', {
    env: { SCRIPT: 'true' },
    callback_url: `${receivers.url}/token`,
    callback_url_token: 'wrong',
  })
  await eventually(async () => {
    const { body } = await get(service, '/tasks/wrong/callback')
    const statuses = Object(body).attempts.map((attempt: object) => Object(attempt).status_code)
    expect(statuses.slice(0, 2)).toEqual([401, 401])
  })
})

async function callbackAt(path: string, taskId: string) {
  return eventually(async () => {
    const { body } = await get({ url: receivers.url }, '/received')
    const found = (body as unknown as Record<string, unknown>[]).find(
      (each) => each.path === path && each.task_id === taskId,
    )
    if (!found) throw new Error(`no callback of ${taskId}`)
    return found
  })
}

async function startReceivers() {
  const child = spawn(
    installed('fastapi/venv/bin/python'),
    [new URL('receivers.py', import.meta.url).pathname],
    { env: { ...process.env, TOKEN, SIGNING_SECRET }, stdio: ['ignore', 'ignore', 'pipe'] },
  )
  const ended = once(child, 'exit')
  const said: string[] = []
  for await (const line of createInterface(child.stderr)) {
    said.push(line)
    const url = /running on (http:\S+)/.exec(line)?.[1]
    if (!url) continue
    return {
      url,
      async [Symbol.asyncDispose]() {
        child.kill()
        await ended
      },
    }
  }
  throw new Error(`The receivers did not start:\n${said.join('\n')}`)
}
