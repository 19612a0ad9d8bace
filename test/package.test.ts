/** The package as others install it: built, packed, and used from plain JavaScript and from TypeScript. */
import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { FIXTURE_TASKS, testEnv } from './helpers/app.ts'

const ROOT = new URL('..', import.meta.url).pathname
/** Node 22 in continuous integration, which is the oldest that the library promises to run on. */
const NODE = process.env.CONSUMER_NODE ?? process.execPath

let project: string
const run = async (command: string, args: string[], cwd = project) => {
  const env = testEnv({ HOME: project, npm_config_cache: join(project, 'npm') })
  return (await promisify(execFile)(command, args, { cwd, env })).stdout
}

beforeAll(async () => {
  project = await mkdtemp(join(tmpdir(), 'package-test-'))
  const packed = await run(
    'npm',
    ['pack', '--ignore-scripts', '--json', '--pack-destination', project],
    ROOT,
  )
  const { filename } = JSON.parse(packed.slice(packed.indexOf('[\n')))[0] as { filename: string }
  const installed = join(project, 'node_modules/task-runner')
  await mkdir(installed, { recursive: true })
  await run('tar', ['-xzf', filename, '-C', installed, '--strip-components', '1'])
  // Its dependencies, as npm would have installed them.
  await symlink(join(ROOT, 'node_modules'), join(installed, 'node_modules'))
  await writeFile(join(project, 'package.json'), '{"type": "module"}')
}, 120_000)
afterAll(() => rm(project, { recursive: true, force: true }))

test('plain JavaScript runs a task, encodes a worker file and verifies a callback', async () => {
  const script = `
    import { CallbackVerificationError, encodeWorkerFile, runTask, TaskRunnerClient, verifyCallback } from 'task-runner'
    const run = await runTask({
      fileName: 'w-eval.sh',
      filesPath: ${JSON.stringify(FIXTURE_TASKS)},
      workerConfig: { env_variables: { SCRIPT: 'echo from a worker; exit 4' } },
      onLog: (text) => process.stdout.write(text),
    })
    console.log(run.success, run.exitCode, run.worker.name.startsWith('task-run-'))
    console.log(encodeWorkerFile({ worker_size: 'Small', email: null }))
    try {
      verifyCallback({}, '', 'whsec_' + 'A'.repeat(32))
    } catch (err) {
      console.log(err instanceof CallbackVerificationError, err.message)
    }
    console.log(typeof new TaskRunnerClient({ url: 'http://127.0.0.1:1' }).submit)
  `
  await writeFile(join(project, 'consumer.js'), script)
  expect(await run(NODE, ['consumer.js'])).toBe(
    'from a worker\nfalse 4 true\n{"worker_size":"Small","additional_params":"e30="}\ntrue it is not signed\nfunction\n',
  )
})

test('TypeScript sees the types, and a wrong field is an error', async () => {
  const script = (field: string) => `
    import { runTask, TaskRunnerClient, verifyCallback, type TaskRunnerRequest } from 'task-runner'
    const request: TaskRunnerRequest = { task_id: 'a', task_file_name: 'a.sh', worker_config: { ${field}: 'Small' } }
    export const status: string = (await new TaskRunnerClient({ url: '' }).get('a')).status
    export const exitCode: number | null = (await runTask({ fileName: 'a.sh' })).exitCode
    export const success: boolean = verifyCallback(new Headers(), '', []).success
    await new TaskRunnerClient({ url: '' }).submit(request)
  `
  const config = {
    compilerOptions: {
      ...{ target: 'es2024', module: 'nodenext', strict: true, noEmit: true, types: ['node'] },
      typeRoots: [join(ROOT, 'node_modules/@types')],
    },
  }
  await writeFile(join(project, 'tsconfig.json'), JSON.stringify(config))
  const tsc = join(ROOT, 'node_modules/.bin/tsc')
  await writeFile(join(project, 'consumer.ts'), script('worker_size'))
  await run(tsc, ['-p', '.'])
  await writeFile(join(project, 'consumer.ts'), script('worker_sise'))
  await expect(run(tsc, ['-p', '.'])).rejects.toMatchObject({
    stdout: expect.stringContaining('worker_sise'),
  })
})

test('the command line of the package runs', async () => {
  const cli = join(project, 'node_modules/task-runner/dist/cli.js')
  expect(await run(NODE, [cli, 'run', join(FIXTURE_TASKS, 'echo.sh')])).toBe('hi\n')
})
