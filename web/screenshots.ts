/**
 * Makes docs/screenshots: starts the service with an hour of invented tasks behind it and some real ones under way, and
 * looks at its page. Needs chromium (CHROMIUM tells where, default /usr/bin/chromium), and `npm run build` before.
 */
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { type Browser, chromium } from 'playwright-core'
import type { Reason } from '../src/core/task.ts'
import { type PastTask, putPastTasks } from '../test/helpers/past-tasks.ts'

const ROOT = new URL('..', import.meta.url).pathname
const PICTURES = join(ROOT, 'docs/screenshots')
const MINUTE = 60_000
const WIDE = { width: 1240, height: 800 }

/** Prints what a deployment would, in its colours. */
const DEPLOY = `#!/bin/bash
say() { printf '%b\\n' "$1"; sleep "\${2:-0.02}"; }
say "\\e[1mDeploying \\e[36mshop-frontend\\e[0;1m to staging\\e[0m"
say "\\e[2mregion eu-central-1, 3 replicas\\e[0m"
for step in "Resolve the revision" "Build the image" "Push 14 layers" "Migrate the database"; do
  say "\\e[34m==>\\e[0m \\e[1m$step\\e[0m"
  for part in 1 2 3; do say "    step $part of 3 \\e[32mok\\e[0m"; done
done
say "\\e[33mwarning:\\e[0m 2 deprecated settings in deploy.yaml: \\e[4mreplicaCount\\e[0m, \\e[4mtag\\e[0m"
say "\\e[34m==>\\e[0m \\e[1mRoll out\\e[0m"
for pod in 1 2 3; do say "    pod shop-frontend-$pod  \\e[42;30m READY \\e[0m  0 restarts"; done
say "\\e[34m==>\\e[0m \\e[1mWatch the error rate for a minute\\e[0m"
for ((second = 1; second <= 60; second++)); do say "    \${second}s  errors \\e[32m0.0$((second % 5)) %\\e[0m  p95 $((180 + second % 7 * 4)) ms" 1; done
`
const WAITS = '#!/bin/bash\nsleep 300\n'
const FILES: Record<string, string> = {
  'deploy.sh': DEPLOY,
  'nightly_report.py': 'import time\ntime.sleep(300)\n',
  'train_model.py': 'import time\ntime.sleep(300)\n',
  'sync_catalogue.sh': WAITS,
  'invoice_run.ts': 'setTimeout(() => {}, 300_000)\n',
}

/** The same numbers each time. */
function seeded(seed: number): () => number {
  let state = seed
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648
    return state / 2_147_483_648
  }
}

function pastHour(now: number): PastTask[] {
  const random = seeded(7)
  const names = Object.keys(FILES)
  const tasks: PastTask[] = []
  for (let minute = 59; minute >= 0; minute -= 1) {
    const load = 5 + 4 * Math.sin(minute / 8) + 3 * random()
    for (let count = 0; count < load; count += 1) {
      const taskFileName = names[Math.floor(random() * names.length)] ?? 'deploy.sh'
      const createdAt = now - minute * MINUTE - 30_000 * random() - 20_000
      const claimedAt = createdAt + 40 + 900 * random() ** 4 * load
      const startedAt = claimedAt + 8 + 30 * random()
      const finishedAt = startedAt + 400 + 18_000 * random() ** 3
      const luck = random()
      const bad: { reason: Reason; exitCode: number | null } | undefined =
        luck < 0.06
          ? { reason: 'exit_code', exitCode: 1 }
          : luck < 0.08
            ? { reason: 'timed_out', exitCode: null }
            : luck < 0.085
              ? { reason: 'oom_killed', exitCode: 137 }
              : luck < 0.09
                ? { reason: 'startup_failed', exitCode: 128 }
                : undefined
      tasks.push({
        taskId: '',
        ...{ taskFileName, createdAt, claimedAt, startedAt, finishedAt },
        ...(bad ? { status: 'failed', ...bad } : {}),
        ...(luck > 0.98 ? { status: 'cancelled', reason: 'cancelled' } : {}),
        callback: {
          status: luck < 0.01 ? 'given_up' : 'delivered',
          delayMs: 4 + 60 * random() + (random() < 0.03 ? 1500 * random() : 0),
        },
      })
    }
  }
  // In the order of their acceptance, which is the order of lists.
  const inOrder = tasks.sort((a, b) => a.createdAt - b.createdAt)
  return inOrder.map((task, index) => {
    const stem = task.taskFileName.split('.')[0]?.replaceAll('_', '-')
    return {
      ...task,
      taskId: `${stem}-${5117 - tasks.length + index}`,
      createdAt: Math.round(task.createdAt),
      claimedAt: Math.round(task.claimedAt),
      startedAt: Math.round(task.startedAt),
      finishedAt: Math.round(task.finishedAt),
    }
  })
}

const folder = await mkdtemp(join(tmpdir(), 'task-runner-pictures-'))
const dataDir = join(folder, 'data')
const tasksDir = join(folder, 'tasks')
await mkdir(dataDir)
await mkdir(tasksDir)
await mkdir(PICTURES, { recursive: true })
for (const [name, text] of Object.entries(FILES)) await writeFile(join(tasksDir, name), text)
const sealingKey = randomBytes(32).toString('base64')
await putPastTasks(dataDir, sealingKey, pastHour(Date.now()))

const service = spawn(process.execPath, [join(ROOT, 'src/main.ts')], {
  env: {
    ...{ PATH: process.env.PATH, HOST: '127.0.0.1', PORT: '0', DATA_DIR: dataDir },
    ...{ TASKS_DIR: tasksDir, SEALING_KEY: sealingKey, MAX_CONCURRENT_TASKS: '5' },
  },
  stdio: ['ignore', 'pipe', 'inherit'],
})
const ended = once(service, 'exit')
const listening = Promise.withResolvers<string>()
createInterface(service.stdout).on('line', (line) => {
  if (line.includes('"msg":"listening"')) listening.resolve(JSON.parse(line).address)
})
let browser: Browser | undefined
try {
  const url = await listening.promise
  await submitSome(url)
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox'],
  })
  await picture(browser, url, { name: 'overview', hash: '#/', wait: '.charts' })
  await picture(browser, url, { name: 'tasks-dark', hash: '#/tasks', wait: '.row a', isDark: true })
  await picture(browser, url, {
    name: 'task',
    hash: '#/tasks/deploy-5120',
    wait: '.line >> text=7s',
  })
  await picture(browser, url, {
    ...{ name: 'phone', hash: '#/tasks', wait: '.row a' },
    size: { width: 390, height: 780 },
  })
} finally {
  await browser?.close()
  service.kill('SIGTERM')
  await ended
  await rm(folder, { recursive: true, force: true, maxRetries: 10 })
}

async function submitSome(url: string): Promise<void> {
  const tasks: [string, string, object][] = [
    ['train-model-5117', 'train_model.py', {}],
    ['sync-catalogue-5118', 'sync_catalogue.sh', {}],
    ['nightly-report-5119', 'nightly_report.py', {}],
    ['deploy-5120', 'deploy.sh', { REVISION: '4f2c91e', SERVICE: 'shop-frontend', REPLICAS: 3 }],
    ['invoice-run-5121', 'invoice_run.ts', {}],
    ['train-model-5122', 'train_model.py', {}],
    ['deploy-5123', 'deploy.sh', {}],
  ]
  for (const [id, file, variables] of tasks) {
    const answer = await fetch(`${url}/task-runner`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        task_id: id,
        task_file_name: file,
        worker_config: { worker_size: 'Small', env_variables: variables },
        callback_url: `${url}/sample-task-runner-callback`,
      }),
    })
    if (!answer.ok) throw new Error(await answer.text())
  }
}

interface Picture {
  name: string
  hash: string
  /** What the page must show. */
  wait: string
  isDark?: boolean
  size?: { width: number; height: number }
}

async function picture(browser: Browser, url: string, options: Picture): Promise<void> {
  const page = await browser.newPage({
    viewport: options.size ?? WIDE,
    colorScheme: options.isDark ? 'dark' : 'light',
    reducedMotion: 'reduce',
  })
  await page.goto(`${url}/${options.hash}`)
  await page.locator(options.wait).first().waitFor()
  await page.evaluate(() => document.fonts.ready)
  await page.screenshot({ path: join(PICTURES, `${options.name}.png`) })
  await page.close()
  console.log(`docs/screenshots/${options.name}.png`)
}
