import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdir, readdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { Deadline } from '../../src/core/deadline.ts'
import type { Completion, Worker } from '../../src/core/ports.ts'
import { until } from '../../src/core/until.ts'
import { type LocalHarness, openDisposable } from '../helpers/local.ts'
import {
  ODD_EXIT_CODE,
  ODD_THINGS,
  type OddThing,
  oddScript,
  PLACES,
  type Place,
} from '../helpers/odd-worker-folders.ts'
import { fileThere, marker, NEVER, spec, touch } from './contract.ts'

const TIMEOUT_MS = 60_000
/** For one answer: a thread that hangs gives none. */
const ANSWER_MS = 10_000

/** What the shell of a task can still write its exit into, or make anew. */
const WRITABLE = [
  'nothing',
  'an empty file',
  'garbage',
  'JSON of other things',
  'a file that nobody may read',
]
/** Folders in place of a worker's own, into which its exit can be written. */
const FOLDERS = ['an empty folder', 'a folder with files', 'a folder that nobody may enter']

/** Some make their log a large file. */
const UNLIMITED = { maxLogBytes: 2 ** 40 }

const TRUE_END = { reason: 'exit_code', exitCode: ODD_EXIT_CODE }
const LOSS = {
  reason: 'worker_lost',
  exitCode: null,
  message: expect.stringMatching(/^The worker/),
}

/** How the task ends while the service runs. */
function endOf({ name }: OddThing, place: Place) {
  const isTrue =
    place === 'exit' ? WRITABLE.includes(name) : place === '.' ? FOLDERS.includes(name) : true
  return isTrue ? TRUE_END : LOSS
}

async function inTime<T>(answer: Promise<T>): Promise<T> {
  using deadline = new Deadline(ANSWER_MS, [])
  return until(answer, deadline.signal)
}

/** Everything that is asked about a worker, whatever it gives. None of it may hang. */
async function askAbout(harness: LocalHarness, worker: Worker): Promise<void> {
  await inTime(harness.backend.check())
  await inTime(harness.backend.list())
  await inTime(harness.backend.find(worker.name))
  await inTime(worker.status())
  await inTime(worker.logs({ maxBytes: 1000 }).catch(() => {}))
  const log = new AbortController()
  const following = (async () => {
    for await (const _ of worker.follow({ from: 0, signal: log.signal })) log.abort()
  })()
  log.abort()
  await inTime(following.catch(() => {}))
}

async function expectNothingLeft({ backend, settings }: LocalHarness): Promise<void> {
  for (const worker of await backend.list()) await inTime(worker.terminate())
  expect(await backend.list()).toEqual([])
  expect(await readdir(settings.workersDir)).toEqual([])
  expect(backend.leftBehind()).toBe(0)
}

describe.each(PLACES)('tasks that put odd things in the place of %s', (place) => {
  test(
    'end as they should, and nobody else notices',
    async () => {
      await using harness = await openDisposable({})
      const { backend, sharedDir } = harness
      const go = join(sharedDir, marker())
      const bystander = await backend.provision(
        spec(`until [ -e ${go} ]; do sleep 0.02; done; echo fine; exit 5`),
        NEVER,
      )
      const ends: Record<string, Completion> = {}
      const workers: Worker[] = []
      for (const thing of ODD_THINGS) {
        const worker = await inTime(
          backend.provision(spec(oddScript(thing, place), UNLIMITED), NEVER),
        )
        workers.push(worker)
        ends[thing.name] = await inTime(worker.completion(NEVER))
        await askAbout(harness, worker)
      }
      expect(ends).toMatchObject(
        Object.fromEntries(ODD_THINGS.map((thing) => [thing.name, endOf(thing, place)])),
      )
      expect(await bystander.status()).toBe('Running')
      await touch(go)
      expect(await inTime(bystander.completion(NEVER))).toMatchObject({ exitCode: 5 })
      for (const worker of workers) await inTime(worker.terminate())
      await expectNothingLeft(harness)
    },
    TIMEOUT_MS,
  )

  test(
    'are found again or lost after a restart, and nobody else notices',
    async () => {
      await using harness = await openDisposable({})
      const { sharedDir } = harness
      const go = join(sharedDir, marker())
      const wanted = spec(`until [ -e ${go} ]; do sleep 0.02; done; echo fine; exit 5`)
      await harness.backend.provision(wanted, NEVER)
      const odd = ODD_THINGS.map((thing, index) => {
        const made = join(sharedDir, `made-${index}`)
        const slow = { ...thing, make: `${thing.make}\n: >${made}` }
        return { thing, made, wanted: spec(oddScript(slow, place, go), UNLIMITED) }
      })
      for (const { made, wanted } of odd) {
        await inTime(harness.backend.provision(wanted, NEVER))
        await fileThere(made)
      }
      const backend = await harness.reopen()
      const found: Array<{ name: string; end: Promise<Completion> }> = []
      for (const { thing, wanted } of odd) {
        // Only of a folder that is as good as new is nothing known.
        const worker = await inTime(backend.find(wanted.name))
        if (place !== '.') expect(worker, thing.name).toBeDefined()
        if (!worker) continue
        await askAbout(harness, worker)
        found.push({ name: thing.name, end: worker.completion(NEVER) })
      }
      await touch(go)
      for (const { name, end } of found) {
        const completion = await inTime(end)
        if (['log', 'home', 'tmp', 'tasks'].includes(place)) {
          expect(completion, name).toMatchObject(TRUE_END)
        } else if (completion.reason !== 'worker_lost') {
          expect(completion, name).toMatchObject(TRUE_END)
        }
      }
      const bystander = await backend.find(wanted.name)
      expect(await bystander?.completion(NEVER)).toMatchObject({ exitCode: 5 })
      expect((await bystander?.logs({ maxBytes: 100 }))?.content.toString()).toBe('fine\n')
      await expectNothingLeft(harness)
    },
    TIMEOUT_MS,
  )
})

describe('as a user who may not read everything', () => {
  test(
    'tasks that take permissions away end as they should, also after a restart',
    async () => {
      await using harness = await openDisposable({})
      // Root may read all: then it is another user who runs the service.
      const uid = process.getuid?.() === 0 ? 65_534 : undefined
      const folder = join(harness.sharedDir, 'other')
      await mkdir(folder)
      for (const path of [folder, harness.sharedDir, join(harness.sharedDir, '..')]) {
        await chmod(path, 0o777)
      }
      const settings = { ...harness.settings, workersDir: join(folder, 'workers') }
      const moduleOf = (path: string) =>
        JSON.stringify(fileURLToPath(new URL(path, import.meta.url)))
      const script = join(folder, 'service.mjs')
      await writeFile(
        script,
        `const { LocalBackend } = await import(${moduleOf('../../src/workers/local/local-backend.ts')})
        const { ODD_THINGS, PLACES, oddScript } = await import(${moduleOf('../helpers/odd-worker-folders.ts')})
        const { readdirSync } = await import('node:fs')
        const settings = ${JSON.stringify(settings)}
        const never = new AbortController().signal
        const things = ODD_THINGS.filter(({ name }) => name.includes('nobody'))
        const specOf = (name, script) => ({ ...${JSON.stringify(spec(''))}, name, taskId: name,
          environment: { SCRIPT: script, WORKER_NAME: name } })
        let backend = new LocalBackend(settings)
        let number = 0
        const ends = {}
        for (const isRestarted of [false, true]) {
          for (const place of PLACES) {
            for (const thing of things) {
              number += 1
              const name = 'task-' + String(number).padStart(20, '0')
              const until = isRestarted ? settings.workersDir + '-go-' + number : undefined
              let worker = await backend.provision(specOf(name, oddScript(thing, place, until)), never)
              if (isRestarted) {
                await new Promise((resolve) => setTimeout(resolve, 200))
                await backend.close()
                backend = new LocalBackend(settings)
                worker = await backend.find(name)
                ;(await import('node:fs')).writeFileSync(until, '')
              }
              const end = await worker?.completion(never)
              await backend.list()
              await backend.check()
              await worker?.terminate()
              ends[place + ', ' + thing.name + (isRestarted ? ', restarted' : '')] =
                end ? end.reason + ' ' + end.exitCode : 'none'
            }
          }
        }
        const left = [...readdirSync(settings.workersDir), ...readdirSync(settings.workersDir + '-spare')]
        await backend.close()
        console.log(JSON.stringify({ ends, left: left.filter((name) => /^task|unremovable/.test(name)) }))`,
      )
      const service = spawn(process.execPath, [script], {
        stdio: ['ignore', 'pipe', 'pipe'],
        ...(uid === undefined ? {} : { uid, gid: uid }),
      })
      let [said, complaints] = ['', '']
      service.stdout.on('data', (chunk) => {
        said += chunk
      })
      service.stderr.on('data', (chunk) => {
        complaints += chunk
      })
      expect(await once(service, 'close'), complaints).toEqual([0, null])
      const { ends, left } = JSON.parse(said)
      expect(left).toEqual([])
      for (const [name, end] of Object.entries(ends)) {
        const isTrue = /^(log|home|tmp|tasks)/.test(name)
        expect(end, name).toMatch(isTrue ? /^exit_code 3$/ : /^(exit_code 3|worker_lost null)$/)
      }
    },
    TIMEOUT_MS,
  )
})

test(
  'what else lies beside the folders of workers is nobody, and stays where it is',
  async () => {
    await using harness = await openDisposable({})
    const { workersDir } = harness.settings
    const stray: Record<string, string> = {
      plain: 'echo x >plain',
      'task-file': 'echo x >task-file',
      fifo: 'mkfifo fifo',
      socket:
        "perl -e 'use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un(shift))' socket",
      loop: 'ln -s loop loop',
      device: 'mknod device c 1 5',
      'odd name\n': `mkdir "$(printf 'odd name\\n_')" && mv "$(printf 'odd name\\n_')" 'odd name\n'`,
      UPPER: 'mkdir UPPER && mkfifo UPPER/worker.json UPPER/exit',
      '.hidden': 'mkdir .hidden && chmod 000 .hidden',
    }
    const make = spawn('/bin/sh', ['-c', Object.values(stray).join('\n')], { cwd: workersDir })
    expect(await once(make, 'exit')).toEqual([0, null])
    const names = (await readdir(workersDir)).toSorted()
    expect(names).toEqual(Object.keys(stray).toSorted())
    for (const backend of [harness.backend, await harness.reopen()]) {
      if (backend !== harness.backend) continue
      await inTime(backend.check())
      expect(await inTime(backend.list())).toEqual([])
      const worker = await backend.provision(spec('exit 4'), NEVER)
      expect(await inTime(worker.completion(NEVER))).toMatchObject({ exitCode: 4 })
      expect((await backend.list()).map(({ name }) => name)).toEqual([worker.name])
      await worker.terminate()
    }
    expect((await readdir(workersDir)).toSorted()).toEqual(names)
    const clear = spawn('/bin/sh', ['-c', 'rm -rf ./* ./.hidden'], { cwd: workersDir })
    await once(clear, 'exit')
  },
  TIMEOUT_MS,
)
