import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect } from 'vitest'
import { parse } from 'yaml'
import { needs } from '../helpers/needs.ts'
import { EXAMPLES, type ExampleService, run, startExampleService } from './example-service.ts'

const test = needs('curl', 'jq')
const SCRIPT = join(EXAMPLES, 'ci/run-task.sh')
const SLOW = { env_variables: { STEPS: 60 } }

let service: ExampleService
let folder: string
beforeAll(async () => {
  service = await startExampleService()
  folder = await mkdtemp(join(tmpdir(), 'task-runner-ci-'))
})
afterAll(async () => {
  await service[Symbol.asyncDispose]()
  await rm(folder, { recursive: true, force: true })
})

function runTask(...args: string[]) {
  return run('sh', [SCRIPT, ...args], { env: service.env })
}

async function workerFile(config: object): Promise<string> {
  const path = join(folder, 'worker.json')
  await writeFile(path, JSON.stringify(config))
  return path
}

test('run-task.sh prints the log of a task, byte for byte, and exits 0', async () => {
  const worker = await workerFile({
    log_level: 'None',
    env_variables: { MY_FIRST_PARAM: 'one\n\ndata: two\\n', MY_SECOND_PARAM: 'status: "failed"\n' },
  })
  const { code, stdout, stderr } = await runTask('a task/1 ü', 'parameters.sh', worker).ended
  expect(stderr).toBe('')
  expect(code).toBe(0)
  expect(stdout).toBe('MY_FIRST_PARAM=one\n\ndata: two\\n\nMY_SECOND_PARAM=status: "failed"\n\n')
  expect(await service.task('a task/1 ü')).toMatchObject({ status: 'succeeded' })
})

test('run-task.sh exits 1 for a task that fails, with its log and reason', async () => {
  const { code, stdout, stderr } = await runTask('fails', 'failing.py').ended
  expect(code).toBe(1)
  expect(stdout).toContain('ZeroDivisionError: division by zero\n')
  expect(stderr).toBe('Task fails failed: exit_code, Exit code 1\n')
})

test('run-task.sh exits 2 with the reason when the task is not accepted', async () => {
  const { code, stderr } = await runTask('refused', 'not-there.sh').ended
  expect(code).toBe(2)
  expect(stderr).toMatch(/^The task was not accepted: status 404 .*not-there\.sh/)
})

test('run-task.sh follows what runs already under the same id and request', async () => {
  const worker = await workerFile({ env_variables: { STEPS: 2 } })
  const both = [1, 2].map(() => runTask('same', 'progress.sh', worker).ended)
  for (const { code, stdout } of await Promise.all(both)) {
    expect(code).toBe(0)
    expect(stdout).toBe('step 1 of 2\nstep 2 of 2\ndone\n')
  }
})

test.each([
  ['SIGTERM', 143],
  ['SIGINT', 130],
] as const)('run-task.sh prints as it comes, and %s cancels the task', async (signal, exitCode) => {
  const running = runTask(signal, 'progress.sh', await workerFile(SLOW))
  await expect.poll(() => running.stdout, { timeout: 20_000 }).toContain('step 1 of 60\n')
  running.kill(signal)
  expect(await running.ended).toMatchObject({ code: exitCode, stderr: '' })
  await service.expectStatus(signal, 'cancelled')
})

test('run-task.sh shows the token in no argument of a process', async () => {
  // In front of the real ones on PATH: write down what they are given.
  const seen = join(folder, 'arguments')
  for (const name of ['curl', 'jq', 'sed', 'tee']) {
    const wrapper = `#!/bin/sh\nPATH=\${PATH#*:}\nprintf '%s\\n' ${name} "$@" >>"${seen}"\nexec ${name} "$@"\n`
    await writeFile(join(folder, name), wrapper)
    await chmod(join(folder, name), 0o755)
  }
  const { code, stdout } = await run('sh', [SCRIPT, 'wrapped', 'hello.py'], {
    env: { ...service.env, PATH: `${folder}:${process.env.PATH}` },
  }).ended
  expect(code).toBe(0)
  expect(stdout).toContain('Hello from Python')
  const given = await readFile(seen, 'utf8')
  expect(given).toContain(`${service.url}/task-runner\n`)
  expect(given).toContain(`${service.url}/tasks/wrapped/logs?follow=true\n`)
  expect(given).not.toContain(service.token)
})

test('run-task.sh takes a cut stream up where it was', async () => {
  // A curl that cuts the first stream after its first event.
  const cut = join(folder, 'cut')
  const wrapper = `#!/bin/sh
PATH=\${PATH#*:}
case "$*" in
  *follow=true*)
    if [ ! -e "${cut}" ]; then
      curl "$@" | sed '/^$/q'
      : >"${cut}"
      exit 18
    fi
    echo "$@" >>"${cut}" ;;
esac
exec curl "$@"
`
  const bin = await mkdtemp(join(folder, 'bin-'))
  await writeFile(join(bin, 'curl'), wrapper)
  await chmod(join(bin, 'curl'), 0o755)
  const worker = await workerFile({ env_variables: { STEPS: 4 } })
  const { code, stdout } = await run('sh', [SCRIPT, 'cut', 'progress.sh', worker], {
    env: { ...service.env, PATH: `${bin}:${process.env.PATH}` },
  }).ended
  expect(code).toBe(0)
  expect(stdout).toBe('step 1 of 4\nstep 2 of 4\nstep 3 of 4\nstep 4 of 4\ndone\n')
  expect(await readFile(cut, 'utf8')).toMatch(/last-event-id: [1-9]/)
})

test('the steps of the Jenkinsfile run the task, and cancel it when aborted', async () => {
  const jenkinsfile = await readFile(join(EXAMPLES, 'jenkins/Jenkinsfile'), 'utf8')
  const blocks = [...jenkinsfile.matchAll(/sh '''\n(.*?)'''/gs)].map(([, block]) => block ?? '')
  expect(blocks).toHaveLength(2)
  const [task = '', aborted = ''] = blocks
  // Jenkins sets what `environment` binds, and runs a block so.
  const shell = (block: string, tag: string) =>
    run('sh', ['-xe', '-c', block], { env: { ...service.env, BUILD_TAG: tag } })
  for (const name of Object.keys(service.env)) expect(jenkinsfile).toContain(`${name} = `)

  const { code, stdout, stderr } = await shell(task, 'jenkins-job-1').ended
  expect(code).toBe(0)
  expect(stdout).toContain('task jenkins-job-1\n')
  expect(stdout + stderr).not.toContain(service.token)

  const lost = runTask('jenkins-job-2', 'progress.sh', await workerFile(SLOW))
  await service.expectStatus('jenkins-job-2', 'running')
  expect((await shell(aborted, 'jenkins-job-2').ended).code).toBe(0)
  expect((await lost.ended).code).toBe(1)
  await service.expectStatus('jenkins-job-2', 'cancelled')
})

test('the script of .gitlab-ci.yml runs the task, and after_script cancels it', async () => {
  const file = parse(await readFile(join(EXAMPLES, 'gitlab/.gitlab-ci.yml'), 'utf8'))
  const { variables, script, after_script: afterScript } = file['run-task']
  // GitLab expands variables before it runs the lines.
  const taskIdOf = (job: string) =>
    variables.TASK_ID.replace('$CI_PROJECT_ID', '7').replace('$CI_JOB_ID', job)
  const lines = (all: string[], job: string) =>
    run('sh', ['-e', '-c', all.join('\n')], { env: { ...service.env, TASK_ID: taskIdOf(job) } })
  const { code, stdout } = await lines(script, '1').ended
  expect(code).toBe(0)
  expect(stdout).toContain('task gitlab-7-1\n')
  expect((await lines(afterScript, '1').ended).code, 'a task that has ended is left alone').toBe(0)
  expect(await service.task('gitlab-7-1')).toMatchObject({ status: 'succeeded' })

  const lost = runTask('gitlab-7-2', 'progress.sh', await workerFile(SLOW))
  await service.expectStatus('gitlab-7-2', 'running')
  expect((await lines(afterScript, '2').ended).code).toBe(0)
  expect((await lost.ended).code).toBe(1)
  await service.expectStatus('gitlab-7-2', 'cancelled')
})
