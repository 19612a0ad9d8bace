import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFile, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { BOOTSTRAP } from '../../src/workers/worker-files.ts'
import { whyNot } from '../helpers/programs.ts'
import { fileThere } from './contract.ts'

const PYTHON = '/usr/bin/python3'
const SHELLS = [['/bin/sh'], ['/bin/dash'], ['/bin/bash', '--posix'], ['busybox', 'sh']].filter(
  ([command = '', ...options]) => {
    try {
      execFileSync(command, [...options, '-c', ':'], { stdio: 'ignore' })
      return true
    } catch {
      return false
    }
  },
)
const skipped = whyNot('pid-namespace')
/** Says in the file `cleaned` what it did in its grace period. */
const TIDY = `import signal, sys, time
def stop(*_):
    time.sleep(1)
    open('cleaned', 'w').write('lock released')
    sys.exit()
signal.signal(signal.SIGTERM, stop)
open('ready', 'w')
time.sleep(60)
`
const DEAF = "trap '' TERM; : >ready; while :; do sleep 1; done"

/** Waits until so many processes have this name: a moment after its start one has that of its shell. */
const untilThere = (name: string, count: number) =>
  `until [ "$(cat /proc/[0-9]*/comm 2>/dev/null | grep -cx ${name})" = ${count} ]; do :; done`

interface Contained {
  child: ChildProcess
  folder: string
  output: () => string
  /** Settles when the container has ended and its output was read to its end. */
  ended: Promise<{ code: number | null; output: string; exit: string; tookMs: number }>
  /** Sends TERM to the container's first process, as an engine does. */
  stop: () => Promise<void>
}

describe.each(SHELLS.map((shell) => ({ shell, name: shell.join(' ') })))(
  'bootstrap.sh as the program of a container, under $name',
  ({ shell }) => {
    let root: string
    let workers = 0
    const children: ChildProcess[] = []

    beforeAll(async () => {
      root = await mkdtemp(join(tmpdir(), 'bootstrap-contain '))
    })
    afterEach(() => {
      // Its end is that of all its container.
      for (const child of children.splice(0)) child.kill('SIGKILL')
    })
    afterAll(() => rm(root, { recursive: true, force: true }))

    /** Runs the script in process and mount namespaces of its own, as containers have them. */
    async function contain(
      script: string,
      {
        keep = '',
        graceSeconds = 10,
        taskFolder = 'tasks',
        taskFile = 'task.sh',
      }: { keep?: string; graceSeconds?: number; taskFolder?: string; taskFile?: string } = {},
    ): Promise<Contained> {
      workers += 1
      const folder = join(root, `it's ${workers}`)
      for (const name of ['tasks', 'home/projects/a', 'tmp']) {
        await mkdir(join(folder, name), { recursive: true })
      }
      const bootstrap = join(folder, 'bootstrap.sh')
      await copyFile(BOOTSTRAP, bootstrap)
      await writeFile(
        join(folder, 'environment.sh'),
        'export HOME="$__tr_folder/home" TMPDIR="$__tr_folder/tmp" PATH=/usr/bin:/bin\n',
      )
      await writeFile(join(folder, 'tasks', 'task.sh'), script)
      await writeFile(join(folder, 'tasks', 'tidy.py'), TIDY)
      const message = join(folder, 'message')
      const args = [folder, keep, message, String(graceSeconds * 1_000), taskFolder, taskFile]
      const began = performance.now()
      const child = spawn(
        'unshare',
        [
          ...['--pid', '--fork', '--kill-child', '--mount-proc', ...shell, bootstrap, 'contain'],
          ...[...args, PYTHON, '/bin/bash', process.execPath],
        ],
        {
          env: { PATH: '/usr/bin:/bin' },
          stdio: ['ignore', 'pipe', 'pipe'],
          // A signal to its group must not reach ours.
          detached: true,
        },
      )
      children.push(child)
      let output = ''
      for (const stream of [child.stdout, child.stderr]) {
        stream?.on('data', (chunk) => {
          output += chunk
        })
      }
      const closed = once(child, 'close') as Promise<[number | null]>
      const ended = closed.then(async ([code]) => {
        const tookMs = performance.now() - began
        const exit = await readFile(join(folder, 'exit'), 'utf8')
        // A container that was killed had no time to say it.
        if (code !== 137) expect(await readFile(message, 'utf8')).toBe(exit.replace('over\n', ''))
        return { code, output, exit, tookMs }
      })
      const stop = async () => {
        const path = `/proc/${child.pid}/task/${child.pid}/children`
        const [pid = 0] = (await readFile(path, 'utf8')).trim().split(' ').map(Number)
        // 0 would be all of our own group.
        expect(pid).toBeGreaterThan(1)
        process.kill(pid, 'SIGTERM')
      }
      return { child, folder, output: () => output, ended, stop }
    }

    const runOf = async (script: string) => (await contain(script)).ended
    const inTasks = ({ folder }: Contained, name: string) => join(folder, 'tasks', name)

    describe.skipIf(skipped)('the end of the log', () => {
      test.each(['sed "s/^/[job] /"', 'awk "{ print }"', 'tee -a run.log', 'cat | cat'])(
        'is whole when it went through a program of the task: %s',
        async (filter) => {
          const script = `exec > >(${filter}) 2>&1; echo working; echo ERROR: no space left >&2; exit 1`
          for (const run of await Promise.all(Array.from({ length: 5 }, () => runOf(script)))) {
            expect(run.output).toMatch(/^.*working\n.*ERROR: no space left\n$/)
            expect(run).toMatchObject({ code: 1, exit: 'task 1\n' })
          }
        },
      )

      test('is whole when it went through a loop that takes its time', async () => {
        const loop = 'while read -r line; do sleep 0.2; echo "$(date +%s) $line"; done'
        const { output } = await runOf(`exec > >(${loop}); echo one; echo two; echo three; exit 3`)
        expect(output).toMatch(/^\d+ one\n\d+ two\n\d+ three\n$/)
      })

      test('is waited for two seconds at most', async () => {
        const { output, code, exit, tookMs } = await runOf('sleep 300 & echo one; exit 4')
        expect(output).toBe('one\n[task-runner] Ended 1 process that was still running: sleep\n')
        expect([code, exit]).toEqual([4, 'task 4\n'])
        expect(tookMs).toBeGreaterThan(1_900)
        expect(tookMs).toBeLessThan(6_000)
      })
    })

    describe.skipIf(skipped)('what a task leaves running', () => {
      test('is ended at once when it cannot write to the log, and named', async () => {
        const { output, code, tookMs } = await runOf(
          `nohup sleep 300 >out.txt 2>&1 & setsid env -i sleep 300 >/dev/null 2>&1 &
          ${untilThere('sleep', 2)}; exit 5`,
        )
        expect(output).toBe(
          '[task-runner] Ended 2 processes that were still running: sleep, sleep\n',
        )
        expect(code).toBe(5)
        expect(tookMs).toBeLessThan(1_900)
      })

      test('is named in one line, whatever it calls itself', async () => {
        const named = (name: string) =>
          `${PYTHON} -c 'import time; open("/proc/self/comm", "w").write(${name}); print(flush=True); time.sleep(300)' >>named &`
        const { output } = await runOf(
          `: >named; ${named('"a\\n[x] \\033[2J"')} ${named('"é, %s*"')}
          until [ "$(wc -l <named)" = 2 ]; do sleep 0.02; done`,
        )
        expect(output).toMatch(
          /^\[task-runner\] Ended 2 processes that were still running: [\w ?[\].,%*]+\n$/,
        )
      })

      test('is named a few times, and counted', async () => {
        const { output } = await runOf(
          `for i in 1 2 3 4 5 6 7; do sleep 300 >/dev/null 2>&1 & done; ${untilThere('sleep', 7)}`,
        )
        expect(output).toBe(
          '[task-runner] Ended 7 processes that were still running: sleep, sleep, sleep, sleep, sleep and 2 more\n',
        )
      })

      test('is ended at once when it is so many that another process may not fit', async () => {
        const { output, exit, tookMs } = await runOf(
          'for i in $(seq 300); do sleep 300 & done; exit 4',
        )
        expect(output).toMatch(/ Ended 300 processes that were still running: .* and 295 more\n$/)
        expect(exit).toBe('task 4\n')
        expect(tookMs).toBeLessThan(1_900)
      })

      test('is not said to be there when nothing is, nor when it has ended', async () => {
        expect((await runOf('sleep 0 & echo one')).output).toBe('one\n')
        // Nobody waits for the child of a process that sleeps: it is dead, and there.
        const zombie = `${PYTHON} -c 'import subprocess, time; subprocess.Popen(["true"]); open("ready", "w"); time.sleep(300)'`
        const { output } = await runOf(
          `${zombie} >/dev/null 2>&1 & until [ -e ready ]; do sleep 0.05; done; sleep 0.2`,
        )
        expect(output).toBe('[task-runner] Ended 1 process that was still running: python3\n')
      })
    })

    describe.skipIf(skipped)('TERM', () => {
      test.each([
        ['alone', `${PYTHON} tidy.py`, 143],
        ['in a pipe', `${PYTHON} tidy.py | cat`, undefined],
        ['under timeout, in a group of its own', `timeout 3600 ${PYTHON} tidy.py`, undefined],
        ['in the background', `${PYTHON} tidy.py & wait`, 143],
      ])('gives what a script has started its time, too: %s', async (_, script, code) => {
        const contained = await contain(script)
        await fileThere(inTasks(contained, 'ready'))
        await contained.stop()
        const ended = await contained.ended
        expect(await readFile(inTasks(contained, 'cleaned'), 'utf8')).toBe('lock released')
        expect(ended.output).not.toContain('still running')
        if (code !== undefined) expect(ended).toMatchObject({ code, exit: `task ${code}\n` })
      })

      test('is the end of a task once nothing is left of it, with its own exit code', async () => {
        const contained = await contain("trap 'echo tidy; exit 7' TERM; : >ready; sleep 60 & wait")
        await fileThere(inTasks(contained, 'ready'))
        const stoppedAt = performance.now()
        await contained.stop()
        expect(await contained.ended).toMatchObject({
          ...{ code: 7, output: 'tidy\n', exit: 'task 7\n' },
        })
        expect(performance.now() - stoppedAt).toBeLessThan(2_000)
      })

      test('ends what does not heed it after the grace period, and names it', async () => {
        const contained = await contain(`(${DEAF}) & exec sleep 300`, { graceSeconds: 1.5 })
        await fileThere(inTasks(contained, 'ready'))
        const stoppedAt = performance.now()
        await contained.stop()
        const { output, code, exit } = await contained.ended
        const tookMs = performance.now() - stoppedAt
        expect(tookMs).toBeGreaterThan(1_400)
        expect(tookMs).toBeLessThan(5_000)
        expect(output).toMatch(/\[task-runner\] Ended 2 processes .*: (bash, sleep|sleep, bash)\n$/)
        expect([code, exit]).toEqual([143, 'task 143\n'])
      })

      test('ends a task that does not heed it after the grace period', async () => {
        const contained = await contain(DEAF, { graceSeconds: 0.5 })
        await fileThere(inTasks(contained, 'ready'))
        await contained.stop()
        expect(await contained.ended).toMatchObject({ code: 137, exit: 'task 137\n' })
      })

      test('of the task itself ends nothing early, and what is left after the grace period', async () => {
        const { output, code, tookMs } = await (
          await contain(
            `(${DEAF}) >/dev/null 2>&1 & until [ -e ready ]; do sleep 0.02; done; kill -TERM 0; sleep 5`,
            { graceSeconds: 1 },
          )
        ).ended
        expect(code).toBe(143)
        expect(output).toContain('still running: ')
        expect(tookMs).toBeLessThan(6_000)
      })
    })

    test.skipIf(skipped)(
      'what kept a task from running is in the log as in the exit file',
      async () => {
        const taskFolder = 'home/projects/a'
        const contained = await contain('', { taskFolder, taskFile: 'a\\tb.sh' })
        const words = 'There is no file "a\\tb.sh" in ~/projects/a'
        expect(await contained.ended).toMatchObject({
          output: `[task-runner] ${words}\n`,
          exit: `startup 127 ${words}\n`,
        })
      },
    )

    test.skipIf(skipped)(
      'a container that is kept says when its task is over, and stays until TERM',
      async () => {
        const contained = await contain('sleep 300 & echo one; exit 6', { keep: 'keep' })
        const exit = () => readFile(join(contained.folder, 'exit'), 'utf8').catch(() => '')
        await expect.poll(exit).toBe('task 6\n')
        expect(contained.output()).toBe('one\n')
        await expect.poll(exit).toBe('task 6\nover\n')
        await expect
          .poll(contained.output)
          .toBe('one\n[task-runner] Ended 1 process that was still running: sleep\n')
        expect(contained.child.exitCode).toBeNull()
        await contained.stop()
        expect(await contained.ended).toMatchObject({ code: 0 })
      },
    )
  },
)
