import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { realpathSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const BOOTSTRAP = fileURLToPath(new URL('../../src/workers/bootstrap.sh', import.meta.url))
const PYTHON = '/usr/bin/python3'
const BIN_SH = basename(realpathSync('/bin/sh'))
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
      options: { python?: string; taskFolder?: string; onOutput?: (output: string) => void } = {},
    ): Promise<Ended> {
      const [command = '', ...flags] = shell
      const interpreters = [options.python ?? PYTHON, '/bin/bash', process.execPath]
      const child = spawn(
        command,
        [
          ...flags,
          BOOTSTRAP,
          'run',
          folder,
          options.taskFolder ?? 'tasks',
          taskFile,
          ...interpreters,
        ],
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

    describe('the "#!" line', () => {
      const NO_OUTPUT = { code: 1, output: '', exit: 'task 1\n' }

      test.each([
        ['#!/bin/bash -e', NO_OUTPUT],
        ['#!/bin/bash -e\r', NO_OUTPUT],
        ['#! /bin/bash  -e ', NO_OUTPUT],
        ['#!/bin/bash -e -u', NO_OUTPUT],
        ['#!/bin/sh -eu', NO_OUTPUT],
        ['#!/usr/bin/env bash', { code: 0, output: 'went on in bash\n', exit: 'task 0\n' }],
        ['#!/usr/bin/env -S bash -euo pipefail', NO_OUTPUT],
        ['#!/usr/bin/env -Sbash -e', NO_OUTPUT],
        ['#!/usr/bin/env --split-string=bash -e', NO_OUTPUT],
        ['#!/usr/bin/env -S BASH_ENV=/dev/null bash -e', NO_OUTPUT],
        ['#!/usr/bin/env -S -u NONE bash -e', NO_OUTPUT],
        [`#!/usr/bin/env -S bash '-e'`, NO_OUTPUT],
        [`#!/usr/bin/env  -S'bash' "-e"`, NO_OUTPUT],
        ['#!/bin/sh', { code: 0, output: `went on in ${BIN_SH}\n`, exit: 'task 0\n' }],
        ['#!/bin/bash', { code: 0, output: 'went on in bash\n', exit: 'task 0\n' }],
        ['#!', { code: 0, output: 'went on in bash\n', exit: 'task 0\n' }],
        ['# no such line', { code: 0, output: 'went on in bash\n', exit: 'task 0\n' }],
      ])('%j counts in a .sh', async (line, ended) => {
        const source = `${line}\nfalse\necho "went on in $(basename "$(readlink /proc/$$/exe)")"\n`
        const folder = await makeWorker({ 'tasks/task.sh': source })
        const { output, ...rest } = await run(folder, 'task.sh')
        const ofTask = output.replace(/^\[task-runner\] .*CRLF.*\n/, '')
        expect({ ...rest, output: ofTask }).toEqual(ended)
      })

      test('a .sh may be of another language', async () => {
        for (const line of [
          '#!/usr/bin/env python3',
          `#!${PYTHON}`,
          '#!/usr/bin/env -S python3 -I',
        ]) {
          const folder = await makeWorker({
            'tasks/task.sh': `${line}\nimport sys; print(sys.version_info[0], sys.flags.isolated)`,
          })
          const output = `3 ${line.endsWith('-I') ? 1 : 0}\n`
          expect(await run(folder, 'task.sh')).toEqual({ code: 0, output, exit: 'task 0\n' })
        }
      })

      test('its options hold for .py and .js, which keep their interpreter', async () => {
        const python = `import sys, warnings; print(sys.executable, flush=True); warnings.warn('careful')`
        const folder = await makeWorker({
          'tasks/plain.py': `#!/usr/bin/env python3\n${python}`,
          'tasks/strict.py': `#!/usr/bin/env -S python3.11 -W error\n${python}`,
          'tasks/crlf.py': `#!/usr/bin/python3 -W error\r\n${python}\r\n`,
          'tasks/task.js':
            '#!/usr/bin/env -S node --title=of-its-line\nconsole.log(process.title)\n',
          'tasks/task.cjs':
            '#!/usr/local/bin/node --title=of-its-line\nconsole.log(process.title)\n',
        })
        const plain = await run(folder, 'plain.py')
        expect(plain).toMatchObject({ code: 0 })
        expect(plain.output).toMatch(/^\/usr\/bin\/python3\n.*UserWarning: careful/)
        for (const name of ['strict.py', 'crlf.py']) {
          await rm(join(folder, 'exit'))
          const { code, output } = await run(folder, name)
          expect({ name, code }).toEqual({ name, code: 1 })
          expect(output).toMatch(/^\/usr\/bin\/python3\nTraceback/)
        }
        for (const name of ['task.js', 'task.cjs']) {
          expect(await run(folder, name)).toMatchObject({ code: 0, output: 'of-its-line\n' })
        }
      })

      test.each([
        ['task.py', '#!/bin/sh -e', '/bin/sh', 'python3'],
        ['task.py', '#!/usr/bin/env -S uv run --script', 'uv', 'python3'],
        ['task.js', '#!/usr/bin/env -S deno run', 'deno', 'node'],
        ['task.py', `#!/usr/bin/env -S python3 -W 'error'`, 'env', 'python3'],
      ])('%s with %j: the log says that it is not followed', async (name, line, asked, taken) => {
        const source = name.endsWith('.py') ? "print('ran')" : "console.log('ran')"
        const folder = await makeWorker({ [`tasks/${name}`]: `${line}\n${source}\n` })
        const { code, output } = await run(folder, name)
        expect(code).toBe(0)
        const [note = '', ...rest] = output.split('\n')
        expect(rest).toEqual(['ran', ''])
        expect(note).toMatch(/^\[task-runner\] /)
        expect(note).toContain(`"${asked.includes('/') ? asked : note.split('"')[1]}"`)
        expect(note).toContain(asked)
        expect(note).toContain(taken)
      })

      test.each([
        ['#!/nonexistent/bash -e', /\/nonexistent\/bash.*\/bash/, 1],
        ['#!/usr/bin/env -S ksh-of-nowhere', /ksh-of-nowhere.*\/bin\/bash/, 0],
        ['#!/nonexistent/ash -e', /\/nonexistent\/ash.*\/bin\/bash/, 1],
        ['#!/opt/nonexistent/ruby -w', /\/opt\/nonexistent\/ruby.*\/bin\/bash/, 0],
        ['#!/etc', /\/etc.*\/bin\/bash/, 0],
        ['#!/etc/os-release', /\/etc\/os-release.*\/bin\/bash/, 0],
      ])(
        '%j names no program that is here: a shell runs it, and the log says so',
        async (line, said, code) => {
          const folder = await makeWorker({ 'tasks/task.sh': `${line}\nfalse\necho "ran $BASH"` })
          const ended = await run(folder, 'task.sh')
          // What a shell's options promise still holds: no script goes on past its failure.
          expect(ended).toMatchObject({ code, exit: `task ${code}\n` })
          const [note, ...rest] = ended.output.split('\n')
          expect(note).toMatch(/^\[task-runner\] /)
          expect(note).toMatch(said)
          expect(rest).toEqual(code === 0 ? ['ran /bin/bash', ''] : [''])
        },
      )

      test('a hostile line becomes words, and nothing of it is run or expanded', async () => {
        const lines = [
          '#!/usr/bin/printf %s| $(touch$IFS./made) `touch made` ; touch made * ~ $HOME && "q \'q',
          '#!$(touch made) -e',
          '#!`touch made`',
          '#!/bin/*h -e',
          '#!/usr/bin/env $(touch$IFS./made)',
          '#!/usr/bin/env fail',
          '#!/usr/bin/env exit',
          '#!exit',
          `#!${'/'.repeat(5000)}`,
          `#!/bin/bash ${'-u '.repeat(2000)}`,
        ]
        for (const line of lines) {
          const folder = await makeWorker({ 'tasks/task.sh': `${line}\nexit 7\n` })
          const { exit } = await run(folder, 'task.sh')
          expect(exit).toBe(line.includes('printf') ? 'task 0\n' : 'task 7\n')
          for (const where of ['tasks', 'home']) {
            await expect(readFile(join(folder, where, 'made'))).rejects.toThrow('ENOENT')
          }
        }
        const folder = await makeWorker({ 'tasks/task.sh': `${lines[0]}\n` })
        expect((await run(folder, 'task.sh')).output).toBe(
          '$(touch$IFS./made)|`touch|made`|;|touch|made|*|~|$HOME|&&|"q|\'q|./task.sh|',
        )
      })

      test('it counts for a startup script: one that fails is no success', async () => {
        const folder = await makeWorker({
          'startup.sh': '#!/bin/bash -e\nfalse\necho went on\n',
          'tasks/task.sh': 'echo the task ran',
        })
        const ended = await run(folder, 'task.sh')
        expect(ended.exit).toBe('startup 1 The startup script failed with exit code 1\n')
        expect(ended.output).not.toContain('went on')
        const other = await makeWorker({
          'startup.sh': '#!/usr/bin/env python3\nprint("startup in Python")\n',
          'tasks/task.sh': 'echo "task $(set -o | grep noglob)"; echo *',
        })
        expect((await run(other, 'task.sh')).output.replaceAll(/\s+/g, ' ')).toBe(
          'startup in Python task noglob off sub task.sh ',
        )
      })

      test('a file of a repository, in a folder below home', async () => {
        const folder = await makeWorker({ 'home/task.sh': '#!/bin/bash -e\nfalse\necho went on' })
        expect(await run(folder, 'task.sh', { taskFolder: 'home' })).toEqual(NO_OUTPUT)
      })

      test('nothing that chose it reaches the task', async () => {
        const folder = await makeWorker({
          'tasks/task.sh':
            '#!/usr/bin/env bash\nset | grep __tr_; env | grep __tr_; printf "%q" "$IFS"',
        })
        expect((await run(folder, 'task.sh')).output).toBe(`$' \\t\\n'`)
      })

      test('a bundle of one long line starts at once', async () => {
        const folder = await makeWorker({
          'tasks/task.js': `/*${'x'.repeat(8_000_000)}*/console.log('ran')`,
        })
        const startedAt = performance.now()
        expect((await run(folder, 'task.js')).output).toBe('ran\n')
        // Read byte by byte, as some shells do, it takes nine.
        expect(performance.now() - startedAt).toBeLessThan(4_000)
      })
    })

    describe('files made on Windows', () => {
      const BOM = '\ufeff'

      test('the line behind a byte order mark counts, and the first line does not fail', async () => {
        const folder = await makeWorker({
          'tasks/lined.sh': `${BOM}#!/bin/bash -e\necho first\nfalse\necho went on\n`,
          'tasks/plain.sh': `${BOM}echo first; cat "$0" | head -c 4`,
          'tasks/python.sh': `${BOM}#!/usr/bin/env python3\nprint('python')\n`,
        })
        const lined = await run(folder, 'lined.sh')
        expect(lined.output).toMatch(/^\[task-runner\] .*BOM.*\nfirst\n$/)
        expect(lined.code).toBe(1)
        expect((await run(folder, 'plain.sh')).output).toMatch(
          /^\[task-runner\] .*BOM.*\nfirst\necho$/,
        )
        expect((await run(folder, 'python.sh')).output).toBe('python\n')
      })

      test('a mark in a startup script is no failure', async () => {
        const folder = await makeWorker({
          'startup.sh': `${BOM}#!/bin/sh -e\necho startup\n`,
          'tasks/task.sh': 'echo task',
        })
        const { code, output } = await run(folder, 'task.sh')
        expect(output).toMatch(/^\[task-runner\] .*BOM.*\nstartup\ntask\n$/)
        expect(code).toBe(0)
      })

      test('a file of a repository stays as it is: the log names the mark', async () => {
        const source = `${BOM}echo first\necho second\n`
        const folder = await makeWorker({ 'home/task.sh': source })
        const { output } = await run(folder, 'task.sh', { taskFolder: 'home' })
        expect(output).toMatch(/^\[task-runner\] .*BOM/m)
        expect(output).toMatch(/not found|No such file/)
        expect(output).toMatch(/^second$/m)
        expect(await readFile(join(folder, 'home/task.sh'), 'utf8')).toBe(source)
      })

      test('Windows line ends are named, where a shell runs the script', async () => {
        const folder = await makeWorker({
          'startup.sh': 'true\r\n',
          'tasks/task.sh': '#!/bin/bash\r\nexit 3\n',
          'home/task.sh': 'exit 3\r\n',
          'tasks/task.py': '#!/usr/bin/python3\r\nprint("ran")\r\n',
          'tasks/python.sh': '#!/usr/bin/python3\r\nprint("ran")\r\n',
        })
        const hint = /^\[task-runner\] .*CRLF.*LF$/m
        expect((await run(folder, 'task.sh')).output).toMatch(/startup script.*CRLF/)
        await rm(join(folder, 'startup.sh'))
        expect((await run(folder, 'task.sh')).output).toMatch(hint)
        expect((await run(folder, 'task.sh', { taskFolder: 'home' })).output).toMatch(hint)
        expect((await run(folder, 'task.py')).output).toBe('ran\n')
        expect((await run(folder, 'python.sh')).output).toBe('ran\n')
      })
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
      expect(ended.exit).toBe("startup 1 The task's folder is missing\n")
    })

    describe('in the home, the places that people know from Practicus AI', () => {
      const SHOW = 'cd ~ && for i in my/projects practicus/task; do readlink -f "$i"; done'

      test.each(['tasks', 'home/projects/repo'])('are links, of a task in %s', async (where) => {
        const folder = await makeWorker({ 'tasks/task.sh': SHOW, 'startup.sh': SHOW })
        await mkdir(join(folder, 'home', 'projects', 'repo'), { recursive: true })
        await writeFile(join(folder, 'home', 'projects', 'repo', 'task.sh'), SHOW)
        const places = `${join(folder, 'home', 'projects')}\n${join(folder, where)}\n`
        expect(await run(folder, 'task.sh', { taskFolder: where })).toMatchObject({
          output: places.repeat(2),
        })
      })

      test('lead a task of a repository to it where they were made before', async () => {
        const folder = await makeWorker({ 'tasks/task.sh': '' })
        for (const name of ['projects/repo', 'my', 'practicus']) {
          await mkdir(join(folder, 'home', name), { recursive: true })
        }
        await symlink('../projects', join(folder, 'home', 'my', 'projects'))
        await symlink('../../tasks', join(folder, 'home', 'practicus', 'task'))
        const repository = join(folder, 'home', 'projects', 'repo')
        await writeFile(join(repository, 'task.sh'), SHOW)
        const { output } = await run(folder, 'task.sh', { taskFolder: 'home/projects/repo' })
        expect(output).toBe(`${join(folder, 'home', 'projects')}\n${repository}\n`)
      })

      test('stay what they are in an image or on a mounted disk', async () => {
        const folder = await makeWorker({ 'tasks/task.sh': SHOW })
        for (const name of ['my/projects', 'practicus/task']) {
          await mkdir(join(folder, 'home', name), { recursive: true })
        }
        const { output } = await run(folder, 'task.sh')
        expect(output).toBe(`${folder}/home/my/projects\n${folder}/home/practicus/task\n`)
      })
    })

    test('sourced, it defines its functions and runs nothing', async () => {
      const [command = '', ...flags] = shell
      const output = execFileSync(
        command,
        [...flags, '-c', `. '${BOOTSTRAP}'; type choose_interpreter write_exit run`],
        { encoding: 'utf8' },
      )
      for (const name of ['choose_interpreter', 'write_exit', 'run']) {
        expect(output).toMatch(new RegExp(`${name} is a .*function`))
      }
    })
  },
)
