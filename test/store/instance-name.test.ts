import { spawnSync } from 'node:child_process'
import { cp, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { beforeEach, expect, onTestFinished, test } from 'vitest'
import { keptInstanceName } from '../../src/store/instance-name.ts'
import { QUIET } from '../helpers/stores.ts'

let folder: string
let warnings: Array<{ fields: object; message: string }>

beforeEach(async () => {
  const root = await mkdtemp(join(tmpdir(), 'instance-name-'))
  onTestFinished(() => rm(root, { recursive: true }))
  folder = join(root, 'data')
  await mkdir(folder)
  warnings = []
})

const log = {
  ...QUIET,
  warn: (fields: object, message: string) => {
    warnings.push({ fields, message })
  },
}
const nameIn = (dataDir: string) => keptInstanceName(join(dataDir, 'instance'), log)

test('a name is kept, also when its folder is moved', async () => {
  const name = await nameIn(folder)
  expect(name).toMatch(/^.+-[0-9a-f]{8}$/)
  expect(await nameIn(folder)).toBe(name)
  expect((await stat(join(folder, 'instance'))).mode & 0o777).toBe(0o600)
  const moved = `${folder}-moved`
  expect(spawnSync('mv', [folder, moved]).status).toBe(0)
  expect(await nameIn(moved)).toBe(name)
  expect(warnings).toEqual([])
})

test('a copied folder takes a name of its own, which it keeps, and says so once; the original keeps its own', async () => {
  const name = await nameIn(folder)
  const copy = `${folder}-copy`
  // With all that can be kept of a file.
  expect(spawnSync('cp', ['-a', folder, copy]).status).toBe(0)
  const copied = await nameIn(copy)
  expect(copied).toMatch(/^.+-[0-9a-f]{8}$/)
  expect(copied).not.toBe(name)
  expect(warnings).toEqual([
    {
      fields: { path: join(copy, 'instance'), copiedFrom: name, instance: copied },
      message: expect.stringContaining('copy'),
    },
  ])
  expect(await nameIn(copy)).toBe(copied)
  expect(await nameIn(folder)).toBe(name)
  expect(warnings).toHaveLength(1)
})

test('the name that the release before kept is taken over, and differs from that of its copies from then on', async () => {
  await writeFile(join(folder, 'instance'), 'host-0123abcd')
  expect(await nameIn(folder)).toBe('host-0123abcd')
  expect(await nameIn(folder)).toBe('host-0123abcd')
  const copy = `${folder}-copy`
  await cp(folder, copy, { recursive: true })
  expect(await nameIn(copy)).not.toBe('host-0123abcd')
  expect(await nameIn(folder)).toBe('host-0123abcd')
})

test('an empty file, as the release before left it when it was killed, is no name', async () => {
  await writeFile(join(folder, 'instance'), '')
  const name = await nameIn(folder)
  expect(name).toMatch(/^.+-[0-9a-f]{8}$/)
  expect(await nameIn(folder)).toBe(name)
  expect(warnings).toEqual([])
})

test('a crash amid writing leaves the name as it was, and nothing in the way of the next start', async () => {
  const name = await nameIn(folder)
  const whole = await readFile(join(folder, 'instance'), 'utf8')
  await writeFile(join(folder, 'instance.draft'), whole.slice(0, 5))
  expect(await nameIn(folder)).toBe(name)
  const copy = `${folder}-copy`
  await cp(folder, copy, { recursive: true })
  const copied = await nameIn(copy)
  expect(copied).not.toBe(name)
  expect(await nameIn(copy)).toBe(copied)
  expect(await readdir(copy)).toEqual(['instance'])
})
