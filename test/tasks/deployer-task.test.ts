import { execFileSync, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { mkdir, mkdtemp, rm, symlink, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setImmediate } from 'node:timers/promises'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { startApp, taskRequest } from '../helpers/app.ts'

const TASKS = new URL('../../tasks', import.meta.url).pathname
const FILE = join(TASKS, 'deployer_task.py')
const DAY_SECONDS = 24 * 60 * 60
/** For tests that start the file dozens of times. */
const LONG = { timeout: 90_000 }

/**
 * Runs the file with something happening at a chosen moment, told by Python's audit events:
 * before the SIGNAL_AT-th access to the repository it sends itself SIGNAL; before its first rename
 * it runs the code in BEFORE_RENAME, which knows the staging folder and may start a rival.
 */
const AT_A_MOMENT = `
import os, runpy, subprocess, sys
file, repository = sys.argv[1], os.environ["MODEL_REPOSITORY"]
signal_at, before_rename = int(os.environ.pop("SIGNAL_AT", 0)), os.environ.pop("BEFORE_RENAME", None)
accesses = 0
def rival():
    subprocess.run([sys.executable, file], env=os.environ, check=True, stdout=subprocess.DEVNULL)
def watch(event, arguments):
    global accesses, before_rename
    if not (arguments and isinstance(arguments[0], str) and arguments[0].startswith(repository)):
        return
    accesses += 1
    if accesses == signal_at:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    if event == "os.rename" and before_rename:
        code, before_rename = before_rename, None
        exec(code, {"os": os, "rival": rival, "staging": arguments[0]})
sys.addaudithook(watch)
runpy.run_path(file, run_name="__main__")
`

type Env = Record<string, string>

let folder: string
let modelDir: string
let repository: string
/** Where the versions appear. */
let versionsDir: string
let env: Env

const MODEL = {
  'model.onnx': Buffer.alloc(5 * 1024 * 1024, 'weights of more than one chunk;'),
  'labels.txt': Buffer.from('cat\ndog\n'),
  'variables/empty.bin': Buffer.alloc(0),
}

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'task-runner-deployer-'))
  modelDir = join(folder, 'model')
  repository = join(folder, 'repository')
  versionsDir = join(repository, 'blue', 'models', 'pets')
  await mkdir(join(modelDir, 'variables'), { recursive: true })
  await mkdir(join(modelDir, 'assets'))
  await mkdir(repository)
  for (const [path, bytes] of Object.entries(MODEL)) await writeFile(join(modelDir, path), bytes)
  env = {
    DEPLOYMENT_KEY: 'blue',
    PREFIX: 'models',
    MODEL_NAME: 'pets',
    MODEL_DIR: modelDir,
    MODEL_REPOSITORY: repository,
  }
})

afterEach(() => rm(folder, { recursive: true, force: true }))

interface Ended {
  code: number | null
  signal: string | null
  stdout: string
  stderr: string
}

function run(command: [string, ...string[]], env: Env): Promise<Ended> {
  const [program, ...args] = command
  const child = spawn(program, args, { cwd: folder, env, stdio: ['ignore', 'pipe', 'pipe'] })
  return new Promise((resolve, reject) => {
    const output = Promise.all([text(child.stdout), text(child.stderr)])
    child.once('error', reject)
    child.once('close', (code, signal) => {
      output.then(([stdout, stderr]) => resolve({ code, signal, stdout, stderr }), reject)
    })
  })
}

const deploy = (overrides: Env = {}) => run(['/usr/bin/python3', FILE], { ...env, ...overrides })

const deployAtAMoment = (overrides: Env) =>
  run(['/usr/bin/python3', '-c', AT_A_MOMENT, FILE], { ...env, ...overrides })

function names(path: string): string[] {
  return existsSync(path) ? readdirSync(path) : []
}

const versions = () =>
  names(versionsDir)
    .filter((name) => /^[0-9]+$/.test(name))
    .map(Number)
    .sort((a, b) => a - b)

const leftovers = () => names(versionsDir).filter((name) => name.startsWith('.'))

function metadataOf(version: number): Record<string, unknown> {
  return JSON.parse(readFileSync(join(versionsDir, `${version}`, 'metadata.json'), 'utf8'))
}

/** That a version holds the whole model, and metadata that tells the truth about it. */
function expectWhole(version: number): void {
  const path = join(versionsDir, `${version}`)
  const found = readdirSync(path, { recursive: true, encoding: 'utf8' })
  expect(found.sort()).toEqual(
    ['assets', 'metadata.json', 'variables', ...Object.keys(MODEL)].sort(),
  )
  const files = Object.keys(MODEL).map((file) => {
    const bytes = readFileSync(join(path, file))
    return {
      path: file,
      size: bytes.length,
      sha256: createHash('sha256').update(bytes).digest('hex'),
    }
  })
  const sizes = Object.values(MODEL).map((bytes) => bytes.length)
  expect(files.map((file) => file.size)).toEqual(sizes)
  expect(metadataOf(version)).toMatchObject({
    version,
    model: 'pets',
    deployment: 'blue',
    prefix: 'models',
    total_size: sizes.reduce((sum, size) => sum + size),
    files: expect.toSatisfy(
      (listed: { path: string }[]) =>
        listed.length === files.length &&
        files.every((file) => listed.some((each) => JSON.stringify(each) === JSON.stringify(file))),
      'lists every file with the size and sum it has',
    ),
  })
}

/** One line that says what is wrong, no traceback, and nothing left in the repository. */
function expectRefusal(ended: Ended, message: RegExp, code = 1): void {
  expect(ended).toMatchObject({ code, stderr: expect.stringMatching(/^cannot deploy: .+\n$/) })
  expect(ended.stderr).toMatch(message)
  expect([...versions(), ...leftovers()]).toEqual([])
}

describe('what it demands', () => {
  const NAMES = ['DEPLOYMENT_KEY', 'PREFIX', 'MODEL_NAME', 'MODEL_DIR', 'MODEL_REPOSITORY']

  test.each(NAMES)('%s, by name, when it is missing or blank', async (name) => {
    const { [name]: _, ...rest } = env
    for (const incomplete of [rest, { ...rest, [name]: ' ' }]) {
      const ended = await run(['/usr/bin/python3', FILE], incomplete)
      expectRefusal(ended, new RegExp(name), 2)
      for (const other of NAMES) if (other !== name) expect(ended.stderr).not.toContain(other)
    }
  })

  test('all that is missing, in one message', async () => {
    const ended = await run(['/usr/bin/python3', FILE], {})
    expectRefusal(ended, new RegExp(NAMES.join('.*')), 2)
  })

  test.each(['..', '.hidden', 'a/b', '/a', 'a b', 'a\n', '-a', 'é'])(
    'segments that cannot lead elsewhere, unlike %j',
    async (segment) => {
      for (const name of ['DEPLOYMENT_KEY', 'PREFIX', 'MODEL_NAME']) {
        expectRefusal(await deploy({ [name]: segment }), new RegExp(name))
      }
      expect(readdirSync(folder).sort()).toEqual(['model', 'repository'])
    },
  )

  test('an http or https base URL, and does not echo another', async () => {
    for (const url of [
      'ftp://host',
      'host:8000',
      'http://',
      'http://me:hush@host',
      'http://a/?q',
    ]) {
      const ended = await deploy({ MODEL_API_BASE_URL: url })
      expectRefusal(ended, /MODEL_API_BASE_URL/)
      expect(ended.stderr).not.toContain(url)
    }
  })

  test('a model folder with a file in it', async () => {
    await mkdir(join(folder, 'empty', 'inner'), { recursive: true })
    expectRefusal(await deploy({ MODEL_DIR: 'empty' }), /MODEL_DIR holds no file/)
    expectRefusal(await deploy({ MODEL_DIR: 'nowhere' }), /MODEL_DIR does not exist: 'nowhere'/)
    expectRefusal(await deploy({ MODEL_DIR: 'model/labels.txt' }), /MODEL_DIR is not a folder/)
  })

  test('a model that is all its own', async () => {
    await writeFile(join(folder, 'secret'), 'secret')
    const holding = async (path: string, make: () => unknown, message: RegExp) => {
      await make()
      expectRefusal(await deploy(), message)
      await rm(join(modelDir, path))
    }
    const link = (path: string, target: string) =>
      holding(path, () => symlink(target, join(modelDir, path)), new RegExp(`link.*: ${path}\n`))
    await link('leads-out', '../secret')
    await link('assets/leads-out', folder)
    await link('circle', '.')
    const pipe = () => execFileSync('mkfifo', [join(modelDir, 'pipe')])
    await holding('pipe', pipe, /neither a file nor a folder: pipe/)
    const dangling = () => symlink('nothing', join(modelDir, 'dangling'))
    await holding('dangling', dangling, /neither a file nor a folder: dangling/)
    const own = () => writeFile(join(modelDir, 'metadata.json'), '{}')
    await holding('metadata.json', own, /metadata\.json, which the deployer writes/)
    expect((await deploy()).code).toBe(0)
  })

  test('a repository that is there, lasts, and is not part of the model', async () => {
    expectRefusal(await deploy({ MODEL_REPOSITORY: join(folder, 'nowhere') }), /does not exist/)
    expectRefusal(await deploy({ MODEL_REPOSITORY: 'repository' }), /not an absolute path/)
    expectRefusal(await deploy({ MODEL_REPOSITORY: join(modelDir, 'assets') }), /inside MODEL_DIR/)
    const file = join(modelDir, 'labels.txt')
    expectRefusal(await deploy({ MODEL_REPOSITORY: file }), /MODEL_REPOSITORY is not a folder/)
  })
})

describe('a deployment', () => {
  test('is laid out by number, described truthfully, and announced by its URLs', async () => {
    const base = 'https://models.example.com/serve'
    const more = { MODEL_API_BASE_URL: `${base}//`, TASK_ID: 'task-7', MODEL_DIR: 'model' }
    const startedAt = Math.floor(Date.now() / 1000) * 1000
    const first = await deploy(more)
    expect(first).toMatchObject({ code: 0, stderr: '' })
    expect(first.stdout.split('\n').slice(-4)).toEqual([
      `api: ${base}/blue/models/pets/`,
      `version: ${base}/blue/models/pets/1/`,
      `meta: ${base}/blue/models/pets/1/metadata.json`,
      '',
    ])
    expectWhole(1)
    expect(metadataOf(1)).toMatchObject({
      task_id: 'task-7',
      created_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/),
    })
    const createdAt = Date.parse(String(metadataOf(1).created_at))
    expect(createdAt).toBeGreaterThanOrEqual(startedAt)
    expect(createdAt).toBeLessThanOrEqual(Date.now())

    const second = await deploy()
    expect(second.stdout).toContain('version: http://127.0.0.1:8000/blue/models/pets/2/\n')
    expect(metadataOf(2).task_id).toBeNull()
    expectWhole(2)
    expect(readdirSync(versionsDir).sort()).toEqual(['1', '2'])
  })

  test('takes the number after the highest, never one of a gap', async () => {
    await mkdir(join(versionsDir, '7'), { recursive: true })
    await writeFile(join(versionsDir, '9'), 'a file')
    await mkdir(join(versionsDir, 'latest'))
    expect((await deploy()).code).toBe(0)
    expect(versions()).toEqual([7, 9, 10])
    expectWhole(10)
  })

  test('holds copies of what links inside the model lead to', async () => {
    await rm(join(modelDir, 'labels.txt'))
    await writeFile(join(modelDir, 'assets', 'real.txt'), 'cat\n')
    await symlink('assets/real.txt', join(modelDir, 'labels.txt'))
    await symlink(join(modelDir, 'assets'), join(modelDir, 'again'))
    expect((await deploy()).code).toBe(0)
    await rm(modelDir, { recursive: true })
    for (const path of ['labels.txt', 'assets/real.txt', 'again/real.txt']) {
      expect(readFileSync(join(versionsDir, '1', path), 'utf8')).toBe('cat\n')
    }
  })

  test('can be read by whom the umask lets read', async () => {
    await run(['/bin/sh', '-c', 'umask 022; exec /usr/bin/python3 "$0"', FILE], env)
    expect(statSync(join(versionsDir, '1')).mode & 0o777).toBe(0o755)
    expect(statSync(join(versionsDir, '1', 'labels.txt')).mode & 0o777).toBe(0o644)
  })
})

describe('deployers at the same time', () => {
  test('each publish a number of their own, and nobody ever sees a part of one', async () => {
    const seen = new Set<number>()
    const look = () => {
      for (const version of versions()) {
        if (!seen.has(version)) expectWhole(version)
        seen.add(version)
      }
    }
    let isDeploying = true
    const observe = async () => {
      while (isDeploying) {
        look()
        await setImmediate()
      }
      look()
    }
    const ids = Array.from({ length: 8 }, (_, index) => `task-${index}`)
    const deployAll = async () => {
      try {
        return await Promise.all(ids.map((id) => deploy({ TASK_ID: id })))
      } finally {
        isDeploying = false
      }
    }
    const [all] = await Promise.all([deployAll(), observe()])

    const told = all.map(({ stdout }) => Number(/^published version (\d+)/m.exec(stdout)?.[1]))
    expect(told.toSorted()).toEqual([1, 2, 3, 4, 5, 6, 7, 8])
    expect([...seen].sort()).toEqual([1, 2, 3, 4, 5, 6, 7, 8])
    expect(told.map((version) => metadataOf(version).task_id)).toEqual(ids)
    expect(leftovers()).toEqual([])
  })

  test('leave a number to the one that took it between look and publish', async () => {
    const late = await deployAtAMoment({ TASK_ID: 'late', BEFORE_RENAME: 'rival()\nrival()' })
    expect(late).toMatchObject({ code: 0, stdout: expect.stringContaining('published version 3') })
    expect(versions()).toEqual([1, 2, 3])
    for (const version of versions()) expectWhole(version)
    expect(metadataOf(3).task_id).toBe('late')
    expect(leftovers()).toEqual([])
  })
})

describe('what goes wrong', () => {
  /** Deploys again and again, with the signal at the next moment each time, until one comes through. */
  async function signalledAtEveryMoment(
    signal: 'SIGKILL' | 'SIGTERM',
    check: (ended: Ended, before: number[]) => void,
  ): Promise<number> {
    const number = { SIGKILL: '9', SIGTERM: '15' }[signal]
    for (let moment = 1; ; moment += 1) {
      const before = versions()
      const ended = await deployAtAMoment({ SIGNAL_AT: `${moment}`, SIGNAL: number })
      for (const version of versions().slice(before.length)) expectWhole(version)
      if (ended.code === 0) return moment - 1
      check(ended, before)
    }
  }

  test('kill -9 at any moment leaves no part of a version, and hinders nobody', LONG, async () => {
    let published = 0
    const moments = await signalledAtEveryMoment('SIGKILL', (ended, before) => {
      expect(ended.signal).toBe('SIGKILL')
      // Only the last moments, when it makes the rename durable and tidies up, come after it.
      if (versions().length > before.length) published += 1
      else expect(published).toBe(0)
    })
    expect(moments).toBeGreaterThan(20)
    expect(leftovers().length).toBeGreaterThan(10)
    expect(published).toBeLessThan(5)
    expect(versions().at(-1)).toBe(published + 1)
  })

  test('SIGTERM at any moment removes the staging folder', LONG, async () => {
    const moments = await signalledAtEveryMoment('SIGTERM', (ended) => {
      expect(ended).toMatchObject({ code: 128 + 15, stderr: '' })
      expect(leftovers()).toEqual([])
    })
    expect(moments).toBeGreaterThan(20)
  })

  test('a write that fails is told in one line, and nothing of it stays', async () => {
    const limited = 'ulimit -f 4096; exec /usr/bin/python3 "$0"'
    expectRefusal(await run(['/bin/bash', '-c', limited, FILE], env), /File too large/)
    expect((await deploy()).code).toBe(0)
    expectWhole(1)
  })

  test('a file where a folder must be is told in one line', async () => {
    await writeFile(join(repository, 'blue'), '')
    expectRefusal(await deploy(), /File exists: .*blue/)
  })

  test('staging folders are removed a day after the last write, not before', async () => {
    const now = Date.now() / 1000
    for (const [name, age] of [
      ['.staging-old', DAY_SECONDS + 600],
      ['.staging-live', DAY_SECONDS - 600],
      ['.other', 2 * DAY_SECONDS],
    ] as const) {
      await mkdir(join(versionsDir, name), { recursive: true })
      await writeFile(join(versionsDir, name, 'part'), 'part')
      await utimes(join(versionsDir, name), now - age, now - age)
    }
    expect((await deploy()).stdout).toContain('removed .staging-old')
    expect(leftovers().sort()).toEqual(['.other', '.staging-live'])
    expect(readdirSync(join(versionsDir, '.staging-live'))).toEqual(['part'])
  })

  test('a deployer that wakes after its staging folder was removed publishes nothing', async () => {
    const sleep = 'os.utime(staging, (0, 0))\nrival()'
    const ended = await deployAtAMoment({ BEFORE_RENAME: sleep })
    expect(ended).toMatchObject({ code: 1, stderr: expect.stringMatching(/^cannot deploy: .+\n$/) })
    expect(versions()).toEqual([1])
    expectWhole(1)
    expect(leftovers()).toEqual([])
  })
})

test('a task of the service deploys, and its log holds the URLs', async () => {
  await using app = await startApp({ TASKS_DIR: TASKS })
  const request = taskRequest({
    task_file_name: 'deployer_task.py',
    worker_config: { env_variables: env },
  })
  expect(await app.submit(request)).toMatchObject({ body: { success: true } })
  expect(await app.finished(request.task_id)).toMatchObject({ status: 'succeeded', exit_code: 0 })
  const log = await app.text(`/tasks/${request.task_id}/logs`)
  for (const line of [
    'api: http://127.0.0.1:8000/blue/models/pets/',
    'version: http://127.0.0.1:8000/blue/models/pets/1/',
    'meta: http://127.0.0.1:8000/blue/models/pets/1/metadata.json',
  ]) {
    expect(log.split('\n')).toContain(line)
  }
  expectWhole(1)
  expect(metadataOf(1).task_id).toBe(request.task_id)
})

test('a task without its variables fails with exit code 2, and its log names them', async () => {
  await using app = await startApp({ TASKS_DIR: TASKS })
  const request = taskRequest({ task_file_name: 'deployer_task.py' })
  await app.submit(request)
  expect(await app.finished(request.task_id)).toMatchObject({ status: 'failed', exit_code: 2 })
  expect(await app.text(`/tasks/${request.task_id}/logs`)).toContain('DEPLOYMENT_KEY, PREFIX')
})
