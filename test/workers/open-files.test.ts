import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { openDisposable } from '../helpers/local.ts'
import { logOf, NEVER, spec } from './contract.ts'

const MODULE = fileURLToPath(new URL('../../src/workers/local/open-files.ts', import.meta.url))
const ASK = `const { openFilesAtStart } = await import(${JSON.stringify(MODULE)}); console.log(openFilesAtStart())`
/** As npm does between a shell and the service. */
const BETWEEN = `require('node:child_process').spawnSync(process.execPath, process.argv.slice(1), { stdio: 'inherit' })`

/** What a process is told by a shell that was told `limits`. */
function askedAfter(limits: string, args: string[]): string {
  const script = `${limits}; "$@"; exit`
  return execFileSync('/bin/sh', ['-c', script, 'sh', process.execPath, ...args], {
    encoding: 'utf8',
  }).trim()
}

describe('the limit of open files', () => {
  test('is the one of the shell that the service was started by, which Node raises for itself', () => {
    const ask = ['--input-type=module', '-e', ASK]
    expect(askedAfter('ulimit -Sn 211', ask)).toBe('211')
    expect(askedAfter('ulimit -Sn 212; ulimit -Hn 1500', ask)).toBe('212')
    expect(askedAfter('ulimit -Sn 213', ['-e', BETWEEN, '--', ...ask])).toBe('213')
  })

  test('is left as it is where nobody can tell what it was', () => {
    const lowered = `ulimit -n 1400; exec "$0" --input-type=module -e '${ASK}'`
    const output = execFileSync('/bin/sh', ['-c', lowered, process.execPath], { encoding: 'utf8' })
    expect(output.trim()).toBe('undefined')
  })

  test('is the soft limit of tasks, which may raise it again', async () => {
    await using harness = await openDisposable({ openFiles: 214 })
    const run = async (script: string) => {
      const worker = await harness.backend.provision(spec(script), NEVER)
      await worker.completion(NEVER)
      return logOf(worker)
    }
    expect(await run('ulimit -Sn; ulimit -Sn 300; ulimit -Sn')).toBe('214\n300\n')
    expect(await run('ulimit -Sn')).toBe('214\n')
  })
})
