import { cp, mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { loadConfig } from '../src/config.ts'
import { Sealer } from '../src/secrets/sealing.ts'
import { openStorage, type Storage } from '../src/storage-from-config.ts'
import { testEnv } from './helpers/app.ts'
import { startPostgres } from './helpers/postgres.ts'
import { QUIET } from './helpers/stores.ts'

const KEY = Buffer.alloc(32, 7)
const OTHER_KEY = Buffer.alloc(32, 8)
const onThreadDeath = (err: Error) => {
  throw err
}

async function newFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'storage-'))
  onTestFinished(() => rm(folder, { recursive: true, force: true }))
  return folder
}

test('on SQLite, another key is refused before there is any task, and leaves the file to the right one', async () => {
  const config = loadConfig(testEnv({ DATA_DIR: await newFolder() }))
  const first = await openStorage(config, new Sealer(KEY), { log: QUIET, onThreadDeath })
  await first.close()
  await expect(
    openStorage(config, new Sealer(OTHER_KEY), { log: QUIET, onThreadDeath }),
  ).rejects.toThrow('the stored tasks were encrypted with another SEALING_KEY')
  const again = await openStorage(config, new Sealer(KEY), { log: QUIET, onThreadDeath })
  expect(again.deployment).toBe(first.deployment)
  await again.close()
})

test('on Postgres, instances share the deployment; a copied data folder is another instance; another key is none', async () => {
  await using postgres = await startPostgres()
  const folder = await newFolder()
  const databases = { one: await postgres.database(), two: await postgres.database() }
  const open: Storage[] = []
  const start = async (host: string, database: keyof typeof databases, key = KEY) => {
    const config = loadConfig(
      testEnv({
        DATA_DIR: join(folder, host),
        DATABASE_URL: databases[database],
        SEALING_KEY: key.toString('base64'),
      }),
    )
    await mkdir(config.dataDir, { recursive: true })
    const storage = await openStorage(config, new Sealer(key), { log: QUIET, onThreadDeath })
    open.push(storage)
    return storage
  }
  try {
    const original = await start('original', 'one')
    await cp(join(folder, 'original'), join(folder, 'copy'), { recursive: true })
    const copy = await start('copy', 'one')
    expect(copy.instance).not.toBe(original.instance)
    expect(copy.deployment).toBe(original.deployment)
    await expect(start('other-key', 'one', OTHER_KEY)).rejects.toThrow('another SEALING_KEY')
    const elsewhere = await start('elsewhere', 'two')
    expect(elsewhere.deployment).not.toBe(original.deployment)

    await open.shift()?.close()
    const again = await start('original', 'one')
    expect([again.instance, again.deployment]).toEqual([original.instance, original.deployment])
  } finally {
    for (const storage of open) await storage.close()
  }
})
