import { spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  copyFile,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { CompiledQuery } from 'kysely'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { TaskRunnerError } from '../../src/core/errors.ts'
import type { Connection } from '../../src/store/connection.ts'
import { deploymentOf } from '../../src/store/settings.ts'
import { openSqlite } from '../../src/store/sqlite.ts'
import { taskWrites } from '../../src/store/task-writes.ts'
import { describeStores, end, newTask, ORIGIN, storesOver } from './contract.ts'
import { describeReleaseBefore } from './release-0.1.0.ts'
import { describeSettings } from './settings.ts'

let contractFolder: string
let files = 0

beforeAll(async () => {
  contractFolder = await mkdtemp(join(tmpdir(), 'sqlite-contract-'))
})
afterAll(() => rm(contractFolder, { recursive: true, force: true }))

describeStores('SQLite', async () => {
  files += 1
  return openSqlite(join(contractFolder, `${files}.db`))
})

describeReleaseBefore('sqlite', (name) => openSqlite(join(contractFolder, `${name}.db`)))

const fileOf = (name: string) => join(contractFolder, `${name}.db`)
describeSettings('SQLite', {
  open: (name) => openSqlite(fileOf(name)),
  copy: (from, to) => copyFile(fileOf(from), fileOf(to)),
  async openFive(name) {
    const connection = await openSqlite(fileOf(name))
    return Array.from({ length: 5 }, () => connection)
  },
})

describe('the SQLite file', () => {
  let folder: string
  let path: string
  const open_: Connection[] = []

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'sqlite-'))
    path = join(folder, 'data', 'task-runner.db')
  })
  afterEach(async () => {
    for (const connection of open_.splice(0)) await connection.close()
    await rm(folder, { recursive: true, force: true })
  })

  async function open() {
    const connection = await openSqlite(path)
    open_.push(connection)
    return { connection, ...storesOver(connection) }
  }

  async function close(connection: Connection): Promise<void> {
    await connection.close()
    open_.splice(open_.indexOf(connection), 1)
  }

  test('what was stored is there after it is opened again', async () => {
    const first = await open()
    const task = newTask({ callbackUrl: `${ORIGIN}/hook`, callbackUrlToken: 'token' })
    await first.store.insert(task)
    await close(first.connection)
    const second = await open()
    expect(await second.store.get(task.taskId)).toMatchObject({ callbackUrlToken: 'token' })
  })

  test('the next waiting tasks are found in the order of their index', async () => {
    const { connection } = await open()
    const { sql: text, parameters } = taskWrites(connection)
      .claimNext({ at: 1, limit: 2, instance: 'here' })
      .compile()
    const plan = CompiledQuery.raw(`explain query plan ${text}`, [...parameters])
    const { rows } = await connection.db.executeQuery<{ detail: string }>(plan)
    const details = rows.map(({ detail }) => detail).join('\n')
    expect(details).toContain('SEARCH tasks USING COVERING INDEX tasks_queued')
    expect(details).not.toContain('TEMP B-TREE')
  })

  test('what was stored is there after its process was killed', async () => {
    const taskId = 'killed'
    const moduleOf = (name: string) =>
      JSON.stringify(fileURLToPath(new URL(`../../src/${name}.ts`, import.meta.url)))
    const script = join(folder, 'service.mjs')
    await writeFile(
      script,
      `const { openSqlite } = await import(${moduleOf('store/sqlite')})
       const { SqlTaskStore } = await import(${moduleOf('store/task-store')})
       const { Sealer } = await import(${moduleOf('secrets/sealing')})
       const store = new SqlTaskStore(await openSqlite(${JSON.stringify(path)}), new Sealer(Buffer.alloc(32, 7)), { instance: 'here' })
       await store.insert(${JSON.stringify(newTask({ taskId }))})
       console.log('stored')`,
    )
    const service = spawn(process.execPath, [script], { stdio: ['ignore', 'pipe', 'inherit'] })
    await once(service.stdout, 'data')
    const exited = once(service, 'exit')
    service.kill('SIGKILL')
    await exited
    const { store } = await open()
    expect(await store.get(taskId)).toMatchObject({ taskId, status: 'queued' })
  })

  test('leases of the process before are given back: their deliveries are due at once', async () => {
    const first = await open()
    const task = newTask({ callbackUrl: `${ORIGIN}/hook` })
    await first.store.insert(task)
    const claimed = await first.store.claim(task.taskId, 0)
    if (!claimed) throw new Error('not claimed')
    const delivery = { webhookId: 'msg_1', origin: ORIGIN, leaseUntil: 1e15 }
    await first.store.finish(claimed, end({ delivery }))
    await close(first.connection)
    const second = await open()
    const taken = await second.deliveries.takeDue({ now: 1, leaseUntil: 2, exceptOrigins: [] })
    expect(taken?.taskId).toBe(task.taskId)
  })

  test('its deployment is the same after a restore in place, or under another name', async () => {
    const { connection } = await open()
    const id = await deploymentOf(connection)
    await close(connection)
    const backup = await readFile(path)
    await writeFile(path, backup)
    const restored = await open()
    expect(await deploymentOf(restored.connection)).toBe(id)
    await close(restored.connection)
    path = join(folder, 'data', 'renamed.db')
    await rename(join(folder, 'data', 'task-runner.db'), path)
    expect(await deploymentOf((await open()).connection)).toBe(id)
  })

  test('a second opener fails with an error that says why, and disturbs nothing', async () => {
    const { store } = await open()
    const error = await openSqlite(path).then(
      () => undefined,
      (err: Error) => err,
    )
    expect(error?.message).toMatch(/locked|in use|another/i)
    expect(await store.insert(newTask())).toBe(true)
  })

  test('a file that is no database fails, and stays byte for byte as it was', async () => {
    await (await open()).connection.close()
    open_.length = 0
    const content = Buffer.from('precious bytes\n'.repeat(1_000))
    await writeFile(path, content)
    await expect(openSqlite(path)).rejects.toThrow(/not a database/)
    expect((await readFile(path)).equals(content)).toBe(true)
    expect(await readdir(join(folder, 'data'))).toEqual(['task-runner.db'])
  })

  test('a database that lost its second half fails, and stays byte for byte as it was', async () => {
    const { connection, store } = await open()
    for (let count = 0; count < 50; count += 1) {
      await store.insert(newTask({ workerConfig: { startupScript: 'x'.repeat(4_000) } }))
    }
    await close(connection)
    await truncate(path, 8_192)
    const content = await readFile(path)
    await expect(openSqlite(path)).rejects.toThrow(/malformed/)
    expect((await readFile(path)).equals(content)).toBe(true)
  })

  test('the file and what lies beside it are for its owner alone', async () => {
    const umask = process.umask(0)
    try {
      const { store } = await open()
      await store.insert(newTask())
      const modes: string[] = []
      for (const name of await readdir(join(folder, 'data'))) {
        modes.push(`${name} ${((await stat(join(folder, 'data', name))).mode & 0o777).toString(8)}`)
      }
      expect(modes).toEqual(['task-runner.db 600', 'task-runner.db-wal 600'])
      expect(((await stat(join(folder, 'data'))).mode & 0o777).toString(8)).toBe('700')
    } finally {
      process.umask(umask)
    }
  })

  test('no token, variable or callback address can be read in its files', async () => {
    const { connection, store } = await open()
    const task = newTask({
      taskId: 'visible-id',
      callbackUrl: `${ORIGIN}/secret-path?secret-query=1`,
      callbackUrlToken: 'secret-token',
      workerConfig: {
        envVariables: { KEY: 'secret-value' },
        startupScript: 'echo secret-startup',
      },
    })
    await store.insert(task)
    const claimed = await store.claim(task.taskId, 0)
    if (!claimed) throw new Error('not claimed')
    await store.finish(
      claimed,
      end({ delivery: { webhookId: 'msg_1', origin: ORIGIN, leaseUntil: null } }),
    )
    const content = async () => {
      const names = await readdir(join(folder, 'data'))
      const all = await Promise.all(names.map((name) => readFile(join(folder, 'data', name))))
      return Buffer.concat(all).toString('latin1')
    }
    const whileOpen = await content()
    await close(connection)
    for (const text of [whileOpen, await content()]) {
      expect(text).toContain('visible-id')
      expect(text.match(/secret-[a-z]+/g)).toBeNull()
    }
  })

  test('of statements that share a commit, one that fails undoes only itself', async () => {
    const { connection, store } = await open()
    const taken = newTask()
    await store.insert(taken)
    const claimed = await store.claim(taken.taskId, 0)
    if (!claimed) throw new Error('not claimed')
    const log = (taskId: string) =>
      connection.db.insertInto('task_logs').values({
        ...{ task_id: taskId, encoding: 'plain', total_bytes: 1 },
        content: Buffer.from('x'),
      })
    await log(taken.taskId).execute()
    const others = [newTask(), newTask(), newTask(), newTask()]
    const [one, two, three, four] = others as [
      typeof taken,
      typeof taken,
      typeof taken,
      typeof taken,
    ]
    // Sent in one turn, so they wait together: a plain failure, a guard that does not hold, a failure halfway.
    const answers = await Promise.allSettled([
      store.insert(one),
      log(taken.taskId).execute(),
      store.insert(two),
      store.finish({ ...claimed, claim: 99 }, end()),
      store.insert(three),
      store.finish(claimed, end()),
      store.insert(four),
    ])
    expect(answers.map(({ status }) => status)).toEqual([
      ...['fulfilled', 'rejected', 'fulfilled', 'fulfilled', 'fulfilled', 'rejected', 'fulfilled'],
    ])
    for (const { taskId } of others) {
      expect(await store.get(taskId)).toMatchObject({ status: 'queued' })
    }
    expect(await store.get(taken.taskId)).toMatchObject({ status: 'provisioning' })
  })

  test('a failure tells callers that the store is not available, and the cause only the log', async () => {
    const { connection, store } = await open()
    await connection.db.schema.dropTable('tasks').execute()
    const error = await store.get('any').catch((err: unknown) => err)
    expect(error).toBeInstanceOf(TaskRunnerError)
    expect(error).toMatchObject({ code: 'store_unavailable' })
    expect((error as Error).message).not.toMatch(/sqlite|table/i)
    expect(String((error as Error).cause)).toMatch(/no such table/)
    await expect(store.check()).rejects.toMatchObject({ code: 'store_unavailable' })
  })

  test('what was sent before a close is done by it', async () => {
    const { connection, store } = await open()
    const tasks = Array.from({ length: 50 }, () => newTask())
    const inserting = tasks.map((task) => store.insert(task))
    // An insert reaches the thread some turns later: the last answer shows that all have.
    await Promise.all(inserting)
    await close(connection)
    await close(connection)
    const again = await open()
    expect(await again.store.list({ limit: 100 })).toHaveLength(50)
  })
})
