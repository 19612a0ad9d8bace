import { execFileSync } from 'node:child_process'
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readlinkSync,
  realpathSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { ShortPaths } from '../../src/workers/local/short-paths.ts'

const LENGTH_MAX = 40

describe('short paths to the folders of workers', () => {
  let root: string
  let workersDir: string
  const opened: ShortPaths[] = []

  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), 'short-paths-'))
    workersDir = join(root, 'a'.repeat(100), 'workers')
    mkdirSync(workersDir, { recursive: true })
    return () => vi.unstubAllEnvs()
  })
  afterEach(() => {
    for (const each of opened.splice(0)) each.close()
    rmSync(root, { recursive: true, force: true })
  })

  function open(): ShortPaths {
    const paths = new ShortPaths(workersDir)
    opened.push(paths)
    return paths
  }

  function worker(name: string): string {
    const folder = join(workersDir, name)
    mkdirSync(join(folder, 'tmp'), { recursive: true })
    return folder
  }

  test('lead to the folder, from a folder that is for its owner alone, and go with it', () => {
    const paths = open()
    const folder = worker('task-one')
    const short = paths.to(folder)
    expect(join(short, 'tmp').length).toBeLessThanOrEqual(LENGTH_MAX)
    expect(realpathSync(short)).toBe(realpathSync(folder))
    const { mode, uid } = lstatSync(dirname(short))
    expect(mode & 0o777).toBe(0o700)
    expect(uid).toBe(process.getuid?.())
    expect(paths.to(folder)).toBe(short)
    expect(paths.to(worker('task-two'))).not.toBe(short)
    paths.remove(folder)
    expect(readdirSync(dirname(short))).toHaveLength(1)
    paths.remove(folder)
    paths.remove(join(workersDir, 'task-two'))
    paths.close()
    expect(existsSync(dirname(short))).toBe(false)
    expect(readdirSync(dirname(workersDir))).toEqual(['workers'])
  })

  test('are found again by the next process, which removes those of workers that are gone', () => {
    const folder = worker('task-one')
    const gone = worker('task-gone')
    const before = open()
    const short = before.to(folder)
    const shortOfGone = before.to(gone)
    rmSync(gone, { recursive: true })
    const after = open()
    expect(existsSync(short)).toBe(true)
    expect(lstatSync(shortOfGone, { throwIfNoEntry: false })).toBeUndefined()
    expect(after.to(folder)).toBe(short)
    after.remove(folder)
    expect(readdirSync(dirname(short))).toEqual([])
  })

  test('stay while a worker runs on after the end of the service', () => {
    const paths = open()
    const short = paths.to(worker('task-one'))
    paths.close()
    expect(existsSync(join(short, 'tmp'))).toBe(true)
    const next = open()
    next.remove(join(workersDir, 'task-one'))
    next.close()
    expect(existsSync(dirname(short))).toBe(false)
  })

  test.each([
    ['open to others', (folder: string) => chmodSync(folder, 0o777)],
    ['gone', (folder: string) => rmSync(folder, { recursive: true })],
    [
      'a link to somewhere else',
      (folder: string) => {
        rmSync(folder, { recursive: true })
        symlinkSync(root, folder)
      },
    ],
  ])('are made in another folder when theirs is %s', (_, change) => {
    const paths = open()
    const folder = worker('task-one')
    const first = dirname(paths.to(folder))
    change(first)
    for (const each of [paths, open()]) {
      const short = each.to(folder)
      expect(dirname(short)).not.toBe(first)
      expect(realpathSync(short)).toBe(realpathSync(folder))
    }
    expect(readdirSync(root)).not.toContain('tmp')
    paths.remove(folder)
    paths.close()
    rmSync(first, { recursive: true, force: true })
  })

  test('what a task put into the place of one is replaced, or left alone', () => {
    const paths = open()
    const folder = worker('task-one')
    const short = paths.to(folder)
    unlinkSync(short)
    symlinkSync('/', short)
    expect(readlinkSync(paths.to(folder))).toBe(folder)
    unlinkSync(short)
    mkdirSync(short)
    writeFileSync(join(short, 'file'), '')
    expect(paths.to(folder)).toBe(folder)
    paths.remove(folder)
    expect(readdirSync(short)).toEqual(['file'])
    rmSync(dirname(short), { recursive: true })
  })

  test.each([
    ['a FIFO', (pointer: string) => execFileSync('mkfifo', [pointer])],
    ['a folder', (pointer: string) => mkdirSync(pointer)],
    ['empty', (pointer: string) => writeFileSync(pointer, '')],
    ['the path of a folder of others', (pointer: string) => writeFileSync(pointer, tmpdir())],
  ])('hold nothing up where the file that leads to them is %s', (_, make) => {
    make(`${workersDir}-short`)
    const paths = open()
    const folder = worker('task-one')
    expect(realpathSync(paths.to(folder))).toBe(realpathSync(folder))
    expect(dirname(paths.to(folder))).not.toBe(tmpdir())
    paths.remove(folder)
  })

  test('are short also where TMPDIR is long, and the folder itself where nothing can be made', () => {
    const long = join(root, 'b'.repeat(100))
    mkdirSync(long)
    vi.stubEnv('TMPDIR', long)
    const paths = open()
    const folder = worker('task-one')
    expect(paths.to(folder).length).toBeLessThan(LENGTH_MAX)
    expect(readdirSync(long)).toEqual([])
    paths.remove(folder)
    const other = new ShortPaths(join(root, 'nowhere', 'workers'))
    const lost = join(root, 'nowhere', 'workers', 'task-one')
    expect(other.to(lost)).toBe(lost)
  })
})
