/** What becomes of a task's processes at its end, on every backend of containers. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { type BackendHarness, fileThere, logOf, marker, NEVER, spec } from './contract.ts'

/** `open`: with a grace period of some seconds, which the tests need not wait for. */
export function describeContained(name: string, open: () => Promise<BackendHarness>): void {
  describe(`${name}, at the end of a task`, () => {
    let harness: BackendHarness

    beforeAll(async () => {
      harness = await open()
    })
    afterEach(() => harness.clean())
    afterAll(() => harness.dispose())

    test.each([false, true])(
      'the log is whole, and names what was ended with the task (kept: %s)',
      async (keepAfterwards) => {
        const script = `exec > >(while read -r line; do sleep 0.2; echo "got $line"; done) 2>&1
          echo one; echo two; sleep 300 >/dev/null 2>&1 & exit 3`
        const worker = await harness.backend.provision(spec(script, { keepAfterwards }), NEVER)
        expect(await worker.completion(NEVER)).toMatchObject({ reason: 'exit_code', exitCode: 3 })
        expect(await logOf(worker)).toBe(
          'got one\ngot two\n[task-runner] Ended 1 process that was still running: sleep\n',
        )
        expect(await worker.status()).toBe('Completed')
      },
    )

    test.each([false, true])(
      'what a script has started gets the grace period, too (kept: %s)',
      async (keepAfterwards) => {
        const [ready, cleaned] = [marker(), marker()].map((each) => join(harness.sharedDir, each))
        const child = `trap "sleep 0.5; echo yes >${cleaned}; exit" TERM; : >${ready}; while :; do sleep 0.1; done`
        const script = `timeout 300 bash -c '${child}' & exec sleep 300`
        const worker = await harness.backend.provision(spec(script, { keepAfterwards }), NEVER)
        await fileThere(ready ?? '')
        const began = performance.now()
        await worker.stop()
        expect(performance.now() - began).toBeLessThan(harness.graceMs)
        expect(await readFile(cleaned ?? '', 'utf8')).toBe('yes\n')
        expect(await worker.completion(NEVER)).toMatchObject({ signal: 'SIGTERM', exitCode: 143 })
        expect(await logOf(worker)).not.toContain('still running')
      },
    )
  })
}
