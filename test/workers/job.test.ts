import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { type Job, jobText, SLOT_PIPE } from '../../src/workers/local/job.ts'
import { quote } from '../../src/workers/quote.ts'

const BOOTSTRAP = fileURLToPath(new URL('../../src/workers/bootstrap.sh', import.meta.url))
const INTERPRETERS = { python: '/usr/bin/python3', shell: '/bin/sh', node: process.execPath }

const withoutNul = fc
  .oneof(
    fc.string({ unit: 'binary', maxLength: 60 }),
    fc.string({
      unit: fc.constantFrom(...'\'"\\$`!*?[]{}()<>|&;#~=% \t\n\r\u007f\u0001é😀-aZ0'),
      maxLength: 60,
    }),
  )
  .map((value) => value.replaceAll('\0', ''))

describe('quote', () => {
  test('any string without NUL reaches a command of a real shell byte for byte', () => {
    fc.assert(
      fc.property(fc.array(withoutNul, { minLength: 1, maxLength: 200 }), (values) => {
        const script = values.map((value) => `printf '%s\\0' ${quote(value)}\n`).join('')
        const output = execFileSync('/bin/sh', ['-s'], { input: script, maxBuffer: 2 ** 26 })
        const expected = Buffer.from(values.map((value) => `${value}\0`).join(''))
        expect(output.equals(expected)).toBe(true)
      }),
      { numRuns: 40 },
    )
  })

  test('any string without NUL reaches the environment of one command, and no other', () => {
    const dump = `${quote(process.execPath)} -e 'process.stdout.write(process.env.V ?? "unset")'`
    const awkward = `'"\\$(exit)\`\n\t😀\u0001'`
    const script = `V=${quote(awkward)} ${dump}\n${dump}\n`
    expect(execFileSync('/bin/sh', ['-s'], { input: script, env: {} }).toString()).toBe(
      `${awkward}unset`,
    )
  })
})

describe('jobText', () => {
  let root: string
  let job: Job

  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), 'job-'))
    job = {
      name: 'task-a-name',
      folder: join(root, "it's a worker"),
      taskFolder: 'tasks',
      taskFileName: "it's a task.sh",
      environment: { VALUE: "it's\na value", TASK_ID: '1' },
      needsPreparing: false,
    }
    mkdirSync(join(job.folder, 'tasks'), { recursive: true })
    mkdirSync(join(job.folder, 'home'))
    writeFileSync(
      join(job.folder, 'tasks', job.taskFileName),
      'printf "%s" "$VALUE"; read -r exit <../exit; echo "$exit" >../ran; exit 6\n',
    )
  })
  afterEach(() => rmSync(root, { recursive: true, force: true }))

  /** A shell that reads its commands as a slot does. */
  function slot(text: string) {
    const [pipe, log] = [quote(join(root, 'pipe')), quote(join(job.folder, 'log'))]
    const opening = `mkfifo ${pipe}; exec ${SLOT_PIPE}<>${pipe}; cat <${pipe} >>${log} ${SLOT_PIPE}>&- &`
    return spawnSync('/bin/sh', ['-s'], {
      input: `${opening}\n. ${quote(BOOTSTRAP)}\n${text}`,
      env: {},
      cwd: '/',
      encoding: 'utf8',
    })
  }

  const read = (name: string) => readFileSync(join(job.folder, name), 'utf8')

  test.each([false, true])(
    'a whole job runs the task, records its exit code and tells the name (startup script: %s)',
    (needsPreparing) => {
      if (needsPreparing) writeFileSync(join(job.folder, 'startup.sh'), 'echo startup\n')
      const text = jobText({ ...job, needsPreparing }, INTERPRETERS, BOOTSTRAP)
      expect(slot(text).stdout).toBe('task-a-name\n')
      expect(read('log')).toBe(`${needsPreparing ? 'startup\n' : ''}it's\na value`)
      expect(read('ran')).toBe('begun\n')
      expect(read('exit')).toBe('task 6\n')
    },
  )

  test('a job that is cut off anywhere, because its writer died, runs nothing', () => {
    const whole = jobText(job, INTERPRETERS, BOOTSTRAP)
    // Without its last line end it is still whole.
    const lengths = Array.from({ length: whole.trimEnd().length }, (_, length) => length)
    const folder = join(root, 'prefixes')
    mkdirSync(folder)
    for (const length of lengths) {
      const text = `. ${quote(BOOTSTRAP)}\n${whole.slice(0, length)}`
      writeFileSync(join(folder, String(length)), text)
    }
    const loop = `mkfifo ${quote(root)}/any; exec ${SLOT_PIPE}<>${quote(root)}/any
    for file in ${quote(folder)}/*; do
      /bin/sh -s <"$file" 2>/dev/null
      for made in exit ran log; do [ -e ${quote(job.folder)}/$made ] && echo "$file: $made"; done
    done; :`
    expect(execFileSync('/bin/sh', ['-c', loop], { env: {}, encoding: 'utf8' })).toBe('')
    expect(lengths.length).toBeGreaterThan(300)
    expect(slot(whole).stdout).toBe('task-a-name\n')
    expect(existsSync(join(job.folder, 'ran'))).toBe(true)
  })

  const write = (name: string, content: string) =>
    writeFileSync(join(job.folder, 'tasks', name), content)

  test('the first line of a script counts, and leaves nothing for the next job', () => {
    write(
      'strict.sh',
      '#!/bin/bash -eu\n[ -o errexit ] && echo "$IFS|$VALUE"; echo *; false; echo on',
    )
    write('next.sh', `#!${process.execPath} --title=next\nconsole.log(process.title)`)
    write('last.sh', '#!/nonexistent/interpreter\nenv | grep __tr_; echo *')
    const environment = { IFS: '::', VALUE: 'a  *  b' }
    const texts = ['strict.sh', 'next.sh', 'last.sh'].map((taskFileName) =>
      jobText({ ...job, name: taskFileName, taskFileName, environment }, INTERPRETERS, BOOTSTRAP),
    )
    expect(
      slot(`${texts.join('')}echo *\n`)
        .stdout.split('\n')
        .slice(0, 3),
    ).toEqual(['strict.sh', 'next.sh', 'last.sh'])
    const files = "it's a task.sh last.sh next.sh strict.sh"
    expect(read('log')).toBe(
      ` \t\n|a  *  b\n${files}\nnext\n` +
        '[task-runner] "/nonexistent/interpreter", which the first line asks for, is not here: /bin/sh runs it instead\n' +
        `${files}\n`,
    )
    expect(read('exit')).toBe('task 0\n')
  })

  test('jobs follow each other in one shell, and nothing of one reaches the next', () => {
    const first = jobText(job, INTERPRETERS, BOOTSTRAP)
    writeFileSync(
      join(job.folder, 'tasks', 'second.sh'),
      'printf "%s|" "$PWD"; env | grep -c ^VALUE=\n',
    )
    const second = jobText(
      { ...job, name: 'second', taskFileName: 'second.sh', environment: {} },
      INTERPRETERS,
      BOOTSTRAP,
    )
    expect(slot(first + second).stdout).toBe('task-a-name\nsecond\n')
    expect(read('log')).toBe(`it's\na value${job.folder}/tasks|0\n`)
  })

  test('a job whose folder is gone tells its end all the same: nobody waits for ever', () => {
    const text = jobText(job, INTERPRETERS, BOOTSTRAP)
    rmSync(job.folder, { recursive: true })
    expect(slot(text).stdout).toBe('task-a-name\n')
  })

  test('a job whose start cannot be written down does not run, and tells its end', () => {
    // As on a full disk.
    mkdirSync(join(job.folder, 'exit'))
    const text = jobText(job, INTERPRETERS, BOOTSTRAP)
    expect(slot(text).stdout).toBe('task-a-name\n')
    expect(existsSync(join(job.folder, 'ran'))).toBe(false)
  })

  test('a job whose log cannot be opened ends with a failure, and tells its end', () => {
    mkdirSync(join(job.folder, 'log'))
    const text = jobText(job, INTERPRETERS, BOOTSTRAP)
    expect(slot(text).stdout).toBe('task-a-name\n')
    expect(read('exit')).toMatch(/^task [1-9]\d*\n$/)
  })
})
