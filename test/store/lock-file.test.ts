import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { lockFile } from '../../src/store/lock-file.ts'

const MODULE = new URL('../../src/store/lock-file.ts', import.meta.url).href

async function newPath(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'lock-file-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  return join(folder, 'lock')
}

test('one holds it at a time, and whoever comes second is told which; given back, it can be had', async () => {
  const path = await newPath()
  const giveBack = await lockFile(path)
  await expect(lockFile(path)).rejects.toThrow(`another service is using ${path}`)
  await giveBack()
  await (await lockFile(path))()
})

test('a process that is killed gives it back', async () => {
  const path = await newPath()
  const script = `const { lockFile } = await import(${JSON.stringify(MODULE)})
    await lockFile(${JSON.stringify(path)})
    console.log('held')
    setInterval(() => {}, 1000)`
  const args = ['--input-type=module', '--eval', script]
  const holder = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  await once(holder.stdout, 'data')
  await expect(lockFile(path)).rejects.toThrow('another service')
  const exited = once(holder, 'exit')
  holder.kill('SIGKILL')
  await exited
  await (await lockFile(path))()
})
