/** The log of a local task is whole, whatever the task does with its output. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type LocalHarness, openDisposable, openLocal } from '../helpers/local.ts'
import { fileThere, logOf, marker, NEVER, spec, touch } from './contract.ts'

const TIMEOUT_MS = 60_000

let harness: LocalHarness
beforeAll(async () => {
  harness = await openLocal()
})
afterAll(() => harness.dispose())

async function logged(script: string, taskFileName?: string): Promise<string> {
  const wanted = spec(script, { ...(taskFileName && { taskFileName }) })
  const worker = await harness.backend.provision(wanted, NEVER)
  await worker.completion(NEVER)
  return logOf(worker)
}

describe('every line stays, in order,', () => {
  test.each([
    ['of > /dev/stderr', 'echo one; echo two > /dev/stderr; echo three', 'one\ntwo\nthree\n'],
    ['of >> /dev/stdout', 'echo one; echo two >> /dev/stdout; echo three', 'one\ntwo\nthree\n'],
    ['of tee /dev/stderr', 'echo one; seq 3 | tee /dev/stderr | wc -l', 'one\n1\n2\n3\n3\n'],
    [
      'of a file that is copied to /dev/stdout',
      'echo one; echo two >"$HOME/a"; cp "$HOME/a" /dev/stdout; echo three',
      'one\ntwo\nthree\n',
    ],
    [
      'of a handle that is kept open',
      'echo a header; exec 5>/dev/stderr; echo one >&5; echo two; echo three >&5; echo four',
      'a header\none\ntwo\nthree\nfour\n',
    ],
    [
      'of a Python that opens /dev/stdout',
      `echo one; /usr/bin/python3 -c 'open("/dev/stdout", "w").write("two\\n")'; echo three`,
      'one\ntwo\nthree\n',
    ],
    [
      'of a node',
      `echo one; ${process.execPath} -e 'fs.writeFileSync("/dev/stderr", "two\\n"); console.log("three")'; echo four`,
      'one\ntwo\nthree\nfour\n',
    ],
    ['without a line end', 'printf one; printf two >/dev/stderr', 'onetwo'],
  ])('%s', async (_, script, log) => {
    expect(await logged(script)).toBe(log)
  })
})

describe('the end of what goes through a process of the task’s own is there, 20 of 20 times,', () => {
  const filters = {
    sed: `sed 's/^/[job] /'`,
    awk: `awk '{ print "[job] " $0 }'`,
    tee: 'tee -a "$HOME/run.log"',
    'a loop': 'while read -r line; do echo "[job] $line"; done',
    'a slow one': 'while read -r line; do sleep 0.05; echo "[job] $line"; done',
  }
  test.each(Object.entries(filters))(
    'with %s',
    async (name, filter) => {
      const script = `exec > >(${filter}) 2>&1; echo working; echo "ERROR: no space left"; exit 1`
      const start = name === 'tee' ? '' : '[job] '
      const logs = new Set<string>()
      for (let run = 0; run < 20; run += 1) logs.add(await logged(script))
      expect([...logs]).toEqual([`${start}working\n${start}ERROR: no space left\n`])
    },
    TIMEOUT_MS,
  )
})

describe('what a task leaves running', () => {
  test('is ended two seconds later when it could write, and named', async () => {
    const startedAt = performance.now()
    expect(await logged('sleep 1000 & setsid sleep 1000 & echo done')).toBe(
      'done\n[task-runner] Ended 2 processes that were still running: sleep\n',
    )
    const tookMs = performance.now() - startedAt
    expect(tookMs).toBeGreaterThan(1_900)
    expect(tookMs).toBeLessThan(8_000)
  })

  test('is ended at once when it cannot write', async () => {
    const startedAt = performance.now()
    expect(await logged('sleep 1000 >/dev/null 2>&1 & echo done')).toBe(
      'done\n[task-runner] Ended 1 process that was still running: sleep\n',
    )
    expect(performance.now() - startedAt).toBeLessThan(1_900)
  })

  test('does not hide that the task has ended, and is stopped like it', async () => {
    await using patient = await openDisposable({ terminationGraceMs: 20_000 })
    const wanted = spec('sleep 1000 & exit 3')
    const worker = await patient.backend.provision(wanted, NEVER)
    await expect.poll(() => worker.hasEnded?.(), { interval: 10 }).toBe(true)
    expect(await worker.status()).toBe('Running')
    await worker.stop()
    expect(await worker.completion(NEVER)).toMatchObject({ exitCode: 3 })
    expect(await worker.hasEnded?.()).toBe(true)
  })

  test('has its name in one line, whatever it is called', async () => {
    const rename = `/usr/bin/python3 -c 'open("/proc/self/comm", "w").write("a\\nb\\x1b[1m"); import os, time; os.close(1); os.close(2); print; open(os.environ["HOME"] + "/ready", "w"); time.sleep(1000)'`
    const log = await logged(
      `${rename} & until [ -e "$HOME/ready" ]; do sleep 0.01; done; printf done`,
    )
    expect(log).toBe(
      'done\n[task-runner] Ended 1 process that was still running: a\ufffdb\ufffd[1m\n',
    )
  })
})

describe('a task that is stopped: all it has started gets TERM once, and the grace period,', () => {
  const child = `import signal, sys, time
def stop(*_):
    time.sleep(1)
    with open(sys.argv[1], "a") as told: told.write("released\\n")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("lock taken", flush=True)
time.sleep(60)`
  test.each([
    ['below a shell', '/usr/bin/python3 "$HOME/job.py" $TOLD'],
    ['in a pipe', '/usr/bin/python3 "$HOME/job.py" $TOLD | cat'],
    ['in a group of its own', 'timeout 3600 /usr/bin/python3 "$HOME/job.py" $TOLD'],
    ['in a session of its own', 'setsid -w /usr/bin/python3 "$HOME/job.py" $TOLD'],
  ])(
    '%s',
    async (_, command) => {
      await using patient = await openDisposable({ terminationGraceMs: 20_000 })
      const told = join(patient.sharedDir, marker())
      const script = `cat >"$HOME/job.py" <<'E'\n${child}\nE\n${command}; echo after`
      const worker = await patient.backend.provision(
        spec(script, { environment: { TOLD: told } }),
        NEVER,
      )
      await expect.poll(() => logOf(worker), { timeout: 10_000 }).toContain('lock taken')
      await worker.stop()
      expect(await readFile(told, 'utf8')).toBe('released\n')
    },
    TIMEOUT_MS,
  )

  test('at most', async () => {
    const mark = marker()
    const ready = join(harness.sharedDir, marker())
    const script = `setsid sh -c 'trap "" TERM; : >${ready}; while :; do sleep 0.1; done; : ${mark}' & wait`
    const worker = await harness.backend.provision(spec(script), NEVER)
    await fileThere(ready)
    const startedAt = performance.now()
    await worker.stop()
    expect(performance.now() - startedAt).toBeLessThan(5_000)
    expect(await harness.processes(mark)).toEqual([])
  })
})

test('a log longer than a pipe holds comes whole, and stands in its file while the task runs', async () => {
  const go = join(harness.sharedDir, marker())
  const wanted = spec(`seq 200000; until [ -e ${go} ]; do sleep 0.02; done; echo end`)
  const worker = await harness.backend.provision(wanted, NEVER)
  const whole = `${Array.from({ length: 200_000 }, (_, index) => index + 1).join('\n')}\n`
  const path = join(harness.settings.workersDir, wanted.name, 'log')
  await expect.poll(() => readFile(path, 'utf8').then((text) => text === whole)).toBe(true)
  await touch(go)
  await worker.completion(NEVER)
  expect((await logOf(worker, 10_000_000)) === `${whole}end\n`).toBe(true)
})
