/** The real Practicus SDK: what it writes now is what we read, and it reads what we write. */
import { cp, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { encodeWorkerFile, type WorkerConfigInput } from '../../../src/wire/worker-file.ts'
import { FIXTURE_TASKS } from '../../helpers/app.ts'
import { cases, meaningOf } from '../../helpers/practicus-dumps.ts'
import { startStage } from '../../helpers/recovery.ts'
import { installed, outputOf } from '../clients.ts'

const PYTHON = installed('sdk/venv/bin/python')
const STAND_IN = new URL('../../../examples/practicus/tasks', import.meta.url).pathname

const sdk = async (step: 'write' | 'read', input: string) =>
  JSON.parse(await outputOf(PYTHON, [new URL('sdk.py', import.meta.url).pathname, step], { input }))

/** Both dumps of each case, made now. */
const fields = cases.map((each) =>
  typeof each.fields === 'string' ? each.fields : JSON.stringify(each.fields),
)
const dumps: [string, string][] = await sdk('write', `[${fields.join()}]`)
const live = cases.map(({ case: name }, index) => ({ name, dumps: dumps[index] ?? [] }))

test('it writes what our fixtures say, byte for byte', () => {
  expect(dumps).toEqual(
    cases.map((each) => [each.model_dump_json_exclude_none, each.model_dump_json]),
  )
})

test('a running service takes each of its configurations, or refuses it by the name of the field', async () => {
  const secrets = ['git_secret', 'git-secret', 'MY_SECRET', 'SHARED_KEY', 'registry_secret']
  await using stage = await startStage({
    env: Object.fromEntries(secrets.map((name) => [`SECRET_${name}`, `value of ${name}`])),
  })
  const service = await stage.start()
  const accepted: { taskId: string; name: string }[] = []
  for (const { name, dumps } of live) {
    for (const [form, dump] of dumps.entries()) {
      const taskId = `${name} ${form}`
      // As text: these are the bytes of the SDK.
      const body = `{"task_id": ${JSON.stringify(taskId)}, "task_file_name": "w-environment.js",
        "callback_url": "${stage.receiver.url}", "worker_config": ${dump}}`
      const headers = { 'content-type': 'application/json' }
      const answer = await fetch(`${service.url}/task-runner/`, { method: 'POST', headers, body })
      const meaning = meaningOf(name)
      const said = await answer.text()
      expect(answer.status, `${taskId}: ${said}`).toBe('refused' in meaning ? 422 : 200)
      if ('refused' in meaning) expect(said).toContain(`additional_params.${meaning.refused}`)
      else if (!meaning.gitConfigs) accepted.push({ taskId, name })
    }
  }
  expect(accepted.length).toBeGreaterThan(30)
  for (const { taskId, name } of accepted) {
    const { body } = await stage.callbackOf(taskId)
    expect(body, taskId).toMatchObject({ success: true })
    const meaning = Object(meaningOf(name))
    const environment = JSON.parse(body.logs.slice(body.logs.indexOf('{"')))
    expect(environment, taskId).toMatchObject({
      ...meaning.envVariables,
      ...(meaning.logLevel && { LOG_LEVEL: meaning.logLevel, PRT_LOG_LEVEL: meaning.logLevel }),
    })
    if (meaning.startupScript) expect(body.logs).toContain('pretend: pip install pandas\n')
  }
})

test('it reads a worker file that we write', async () => {
  const written: WorkerConfigInput[] = [
    { worker_size: 'Small', startup_script: 'echo hi', image_config: { pull_policy: 'Always' } },
    {
      ...{ log_level: 'DEBUG', interactive: false, env_variables: { A: 'b', N: 1, T: true } },
      personal_secrets: ['a', 'B:C'],
      git_configs: [{ remote_url: 'https://git.test/r.git', secret_name: 'a', fetch_depth: 1 }],
    },
    {},
  ]
  const files = written.map((config) => encodeWorkerFile(config))
  expect(await sdk('read', JSON.stringify(files))).toEqual(written)
})

test('its worker files and its logger work in a task, and our stand-in steps aside for it', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-sdk-'))
  const tasks = join(folder, 'tasks')
  try {
    await cp(FIXTURE_TASKS, tasks, { recursive: true })
    await cp(STAND_IN, tasks, { recursive: true })
    const [[dump] = []] = await sdk(
      'write',
      JSON.stringify([{ log_level: 'DEBUG', env_variables: { FROM: 'the SDK' } }]),
    )
    await writeFile(join(tasks, 'logs_worker.json'), String(dump))
    await writeFile(
      join(tasks, 'logs.py'),
      `import os
import practicuscore as prt
prt.logger.debug("from " + os.environ["FROM"])
print(prt.__file__, prt.WorkerConfig)
`,
    )
    await using stage = await startStage({ env: { TASKS_DIR: tasks, PYTHON_COMMAND: PYTHON } })
    await stage.submit(await stage.start(), 'logs', 'logs.py', { worker_config: {} })
    const { body } = await stage.callbackOf('logs')
    expect(body).toMatchObject({ success: true })
    expect(body.logs).toMatch(/DEBUG.*from the SDK/)
    expect(body.logs).toContain('site-packages/practicuscore')
  } finally {
    await rm(folder, { recursive: true })
  }
})
