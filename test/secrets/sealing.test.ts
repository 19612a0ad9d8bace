import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { keyFromFolder, Sealer } from '../../src/secrets/sealing.ts'

const sealer = new Sealer(Buffer.alloc(32, 1))
/** Made by the first release, version 1. */
const SEALED_BEFORE = 'AZ5z4c/BXXdkS8dvcV/ygNrzBHqB9iadffcx4b6NeMsdj9XFTEe0ZPeW4V7A24hnWNZTkg37'

describe('Sealer', () => {
  test('any text comes back, under the context it was sealed for', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary' }), fc.string(), (text, context) => {
        expect(sealer.unseal(sealer.seal(text, context), context)).toBe(text)
      }),
    )
  })

  test('what was sealed opens in the releases to come', () => {
    const sealed = Buffer.from(SEALED_BEFORE, 'base64')
    expect(sealer.unseal(sealed, 'task 1')).toBe('{"callbackUrlToken":"é"}')
  })

  test('the text cannot be read in it, and sealing twice gives two values', () => {
    const sealed = sealer.seal('secret', 'a')
    expect(sealed.toString('latin1')).not.toContain('secret')
    expect(sealed.equals(sealer.seal('secret', 'a'))).toBe(false)
  })

  test('it does not open under another context or with another key', () => {
    const sealed = sealer.seal('secret', 'task 1')
    expect(() => sealer.unseal(sealed, 'task 2')).toThrow()
    expect(() => new Sealer(Buffer.alloc(32, 2)).unseal(sealed, 'task 1')).toThrow()
  })

  test('a value that was changed anywhere, or cut, does not open', () => {
    const sealed = sealer.seal('secret', 'a')
    for (let at = 0; at < sealed.length; at += 1) {
      const changed = Buffer.from(sealed)
      changed[at] = (changed[at] ?? 0) ^ 1
      expect(() => sealer.unseal(changed, 'a'), `byte ${at}`).toThrow()
      expect(() => sealer.unseal(sealed.subarray(0, at), 'a'), `${at} bytes`).toThrow()
    }
  })

  test('a value that is a view into a larger one opens, as a database hands it out', () => {
    const sealed = sealer.seal('secret', 'a')
    const larger = new Uint8Array(sealed.length + 20)
    larger.set(sealed, 10)
    expect(sealer.unseal(larger.subarray(10, 10 + sealed.length), 'a')).toBe('secret')
  })

  test.each([0, 16, 31, 33])('a key of %i bytes is refused', (bytes) => {
    expect(() => new Sealer(Buffer.alloc(bytes))).toThrow('32 bytes')
  })

  test('keys for other purposes differ from it and from each other, and stay the same', () => {
    const [a, b] = [sealer.derive('a'), sealer.derive('b')]
    expect(a).toHaveLength(32)
    expect(a.equals(b)).toBe(false)
    expect(a.equals(new Sealer(Buffer.alloc(32, 1)).derive('a'))).toBe(true)
    expect(a.equals(Buffer.alloc(32, 1))).toBe(false)
  })
})

describe('keyFromFolder', () => {
  let folder: string

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'sealing-'))
  })
  afterEach(() => rm(folder, { recursive: true, force: true }))

  test('it is made once, and is the same ever after', async () => {
    const key = await keyFromFolder(folder)
    expect(key).toHaveLength(32)
    expect((await keyFromFolder(folder)).equals(key)).toBe(true)
    expect(await readdir(folder)).toEqual(['sealing.key'])
  })

  test('its file is for its owner alone', async () => {
    const umask = process.umask(0)
    try {
      await keyFromFolder(folder)
    } finally {
      process.umask(umask)
    }
    expect((await stat(join(folder, 'sealing.key'))).mode & 0o777).toBe(0o600)
  })

  test('a key that a person put there is used', async () => {
    const key = Buffer.alloc(32, 9)
    await writeFile(join(folder, 'sealing.key'), key.toString('base64'))
    expect((await keyFromFolder(folder)).equals(key)).toBe(true)
  })

  test('processes that start at the same time all get the same key', async () => {
    const script = join(folder, 'start.mjs')
    const module = fileURLToPath(new URL('../../src/secrets/sealing.ts', import.meta.url))
    await writeFile(
      script,
      `const { keyFromFolder } = await import(${JSON.stringify(module)})
       console.log('ready')
       process.stdin.once('data', async () => {
         console.log((await keyFromFolder(${JSON.stringify(folder)})).toString('hex'))
         process.exit()
       })`,
    )
    const processes = Array.from({ length: 4 }, () =>
      spawn(process.execPath, [script], { stdio: ['pipe', 'pipe', 'inherit'] }),
    )
    await Promise.all(processes.map(({ stdout }) => once(stdout, 'data')))
    const keys = await Promise.all(
      processes.map(async (each) => {
        const exited = once(each, 'exit')
        const answer = once(each.stdout, 'data')
        each.stdin.write('go')
        const [key] = await answer
        await exited
        return String(key).trim()
      }),
    )
    expect(keys[0]).toMatch(/^[0-9a-f]{64}$/)
    expect(new Set(keys).size).toBe(1)
    expect((await keyFromFolder(folder)).toString('hex')).toBe(keys[0])
    expect((await readdir(folder)).toSorted()).toEqual(['sealing.key', 'start.mjs'])
  })

  test('makers that share a process id, as containers on one volume do, all get the same key', async () => {
    const keys = await Promise.all(Array.from({ length: 4 }, () => keyFromFolder(folder)))
    const stored = Buffer.from(await readFile(join(folder, 'sealing.key'), 'utf8'), 'base64')
    for (const key of keys) expect(key.equals(stored)).toBe(true)
  })
})
