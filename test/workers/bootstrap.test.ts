import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const BOOTSTRAP = fileURLToPath(new URL('../../src/workers/bootstrap.sh', import.meta.url))
const PYTHON = '/usr/bin/python3'
const SHELLS = [['/bin/sh'], ['/bin/dash'], ['/bin/bash', '--posix'], ['busybox', 'sh']].filter(
  isThere,
)

function isThere([command, ...options]: readonly string[]): boolean {
  try {
    execFileSync(command ?? '', [...options, '-c', ':'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

interface Ended {
  code: number | null
  output: string
  /** What the exit file holds; undefined when there is none. */
  exit: string | undefined
}

describe.each(SHELLS.map((shell) => ({ shell, name: shell.join(' ') })))(
  'bootstrap.sh under $name',
  ({ shell }) => {
    let root: string
    let workers = 0

    beforeAll(async () => {
      root = await mkdtemp(join(tmpdir(), 'bootstrap '))
    })
    afterAll(() => rm(root, { recursive: true, force: true }))

    async function makeWorker(files: Record<string, string>): Promise<string> {
      workers += 1
      // A name that needs its quotes everywhere.
      const folder = join(root, `it's $HOME ${workers}`)
      for (const name of ['tasks/sub', 'home']) await mkdir(join(folder, name), { recursive: true })
      for (const [name, content] of Object.entries(files)) {
        await writeFile(join(folder, name), content)
      }
      return folder
    }

    async function run(
      folder: string,
      taskFile: string,
      options: { python?: string; onOutput?: (output: string) => void } = {},
    ): Promise<Ended> {
      const [command = '', ...flags] = shell
      const interpreters = [options.python ?? PYTHON, '/bin/bash', process.execPath]
      const child = spawn(
        command,
        [...flags, BOOTSTRAP, 'run', folder, 'tasks', taskFile, ...interpreters],
        {
          env: { PATH: '/usr/bin:/bin', HOME: join(folder, 'home') },
          stdio: ['pipe', 'pipe', 'pipe'],
        },
      )
      let output = ''
      for (const stream of [child.stdout, child.stderr]) {
        stream.on('data', (chunk) => {
          output += chunk
          options.onOutput?.(output)
        })
      }
      child.stdin.end()
      const [code] = (await once(child, 'close')) as [number | null]
      const exit = await readFile(join(folder, 'exit'), 'utf8').catch(() => undefined)
      return { code, output, exit }
    }

    const FILES = {
      'task.sh': 'echo "shell $BASH"',
      'task.py': 'import sys; print("python", sys.version_info[0])',
      'task.js': "console.log('node', typeof require)",
      'task.mjs': "console.log('module', typeof require, import.meta.url !== undefined)",
      'task.ts': "const kind: string = 'typescript'; console.log(kind)",
      'sub/task.sh': 'echo "sub $0"',
    }
    test.each([
      ['task.sh', 'shell /bin/bash\n'],
      ['task.py', 'python 3\n'],
      ['task.js', 'node function\n'],
      ['task.mjs', 'module undefined true\n'],
      ['task.ts', 'typescript\n'],
      ['sub/task.sh', 'sub ./sub/task.sh\n'],
    ])('%s runs with the interpreter of its kind', async (taskFile, output) => {
      const source = FILES[taskFile as keyof typeof FILES]
      const folder = await makeWorker({ [`tasks/${taskFile}`]: source })
      expect(await run(folder, taskFile)).toEqual({ code: 0, output, exit: 'task 0\n' })
    })

    test('a file whose name looks like an option or holds spaces and quotes runs', async () => {
      for (const name of ['-e.sh', "it's a $task.sh", '*.sh']) {
        const folder = await makeWorker({ [`tasks/${name}`]: 'echo ran' })
        expect(await run(folder, name)).toMatchObject({ code: 0, output: 'ran\n' })
      }
    })

    test.each([0, 1, 42, 255])('the exit code %i is recorded and told', async (code) => {
      const folder = await makeWorker({ 'tasks/task.sh': `exit ${code}` })
      expect(await run(folder, 'task.sh')).toEqual({ code, output: '', exit: `task ${code}\n` })
    })

    test('a signal is recorded as 128 and its number', async () => {
      const folder = await makeWorker({ 'tasks/task.sh': 'kill -KILL $$' })
      expect(await run(folder, 'task.sh')).toMatchObject({ code: 137, exit: 'task 137\n' })
    })

    test('a missing interpreter is recorded as 127', async () => {
      const folder = await makeWorker({ 'tasks/task.py': '' })
      const ended = await run(folder, 'task.py', { python: '/nonexistent/python9' })
      expect(ended).toMatchObject({ code: 127, exit: 'task 127\n' })
      expect(ended.output).toContain('python9')
    })

    test('the output of Python is not held back', async () => {
      // The task ends only when its first line has arrived.
      const folder = await makeWorker({
        'tasks/task.py':
          "import os, time\nprint('first')\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('last')",
      })
      const ended = await run(folder, 'task.py', {
        onOutput: (output) => {
          if (output === 'first\n') void writeFile(join(folder, 'tasks', 'go'), '')
        },
      })
      expect(ended.output).toBe('first\nlast\n')
    })

    test('the startup script runs first, at home, under the shell of tasks', async () => {
      const folder = await makeWorker({
        'startup.sh': 'echo "startup $BASH $PWD"; echo made >made',
        'tasks/task.sh': 'echo "task $PWD"; cat ~/made',
      })
      expect(await run(folder, 'task.sh')).toEqual({
        code: 0,
        output: `startup /bin/bash ${folder}/home\ntask ${folder}/tasks\nmade\n`,
        exit: 'task 0\n',
      })
    })

    test.each([1, 17, 255])(
      'a startup script that fails with %i is recorded as such, and the task does not run',
      async (code) => {
        const folder = await makeWorker({
          'startup.sh': `echo oh no; exit ${code}`,
          'tasks/task.sh': 'echo the task ran; : >ran',
        })
        const ended = await run(folder, 'task.sh')
        expect(ended).toMatchObject({
          code,
          exit: `startup ${code} The startup script failed with exit code ${code}\n`,
        })
        expect(ended.output).toMatch(new RegExp(`^oh no\\n.*exit code ${code}\\n$`))
        await expect(readFile(join(folder, 'tasks', 'ran'))).rejects.toThrow('ENOENT')
      },
    )

    test('the exit file is written once: what stands there stays', async () => {
      const folder = await makeWorker({ exit: 'task 5\n', 'tasks/task.sh': 'exit 0' })
      expect((await run(folder, 'task.sh')).exit).toBe('task 5\n')
    })

    test('an empty exit file, as a local worker has it, is filled', async () => {
      const folder = await makeWorker({ exit: '', 'tasks/task.sh': 'exit 3' })
      expect((await run(folder, 'task.sh')).exit).toBe('task 3\n')
    })

    test('a worker without its tasks folder fails, and says so in the exit file', async () => {
      const folder = await makeWorker({})
      await rm(join(folder, 'tasks'), { recursive: true })
      const ended = await run(folder, 'task.sh')
      expect(ended.code).not.toBe(0)
      expect(ended.exit).toBe('startup 1 The folder of the task is not there\n')
    })

    test('sourced, it defines its functions and runs nothing', async () => {
      const [command = '', ...flags] = shell
      const output = execFileSync(
        command,
        [...flags, '-c', `. '${BOOTSTRAP}'; type choose_interpreter finish run`],
        { encoding: 'utf8' },
      )
      for (const name of ['choose_interpreter', 'finish', 'run']) {
        expect(output).toMatch(new RegExp(`${name} is a .*function`))
      }
    })
  },
)
