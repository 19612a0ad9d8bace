import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { networkInterfaces } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'

const OUTPUT_BYTES_MAX = 64 * 1024 * 1024

/**
 * Returns a path below WITNESSES, such as `sdk/venv/bin/python`. Throws where it is not installed,
 * and where the network is more than loopback: clients make the service call any address.
 */
export function installed(path: string): string {
  if (Object.keys(networkInterfaces()).some((name) => name !== 'lo')) {
    throw new Error('This machine has a network: run .ci/witnesses, which takes it away')
  }
  const whole = join(process.env.WITNESSES ?? '/var/tmp/task-runner-ci/witnesses', path)
  if (!existsSync(whole)) throw new Error(`${whole} is missing: run .ci/witnesses`)
  return whole
}

/** Runs a program to its end and returns its standard output. Throws, with all its output, when it fails. */
export async function outputOf(
  command: string,
  args: readonly string[],
  { input, cwd, env }: { input?: string; cwd?: string; env?: Record<string, string> } = {},
): Promise<string> {
  const run = promisify(execFile)(command, args, {
    maxBuffer: OUTPUT_BYTES_MAX,
    cwd,
    env: { ...process.env, ...env },
  })
  run.child.stdin?.end(input)
  try {
    return (await run).stdout
  } catch (err) {
    const { stdout, stderr } = Object(err)
    throw new Error(`${command} failed:\n${stdout}\n${stderr}`, { cause: err })
  }
}
