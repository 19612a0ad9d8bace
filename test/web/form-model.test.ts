import { readFile } from 'node:fs/promises'
import { expect, test } from 'vitest'
import type { ApiDescription } from '../../web/src/api.ts'
import { fieldOf, filled, maskedPaths, pathsOf, requestOf } from '../../web/src/form-model.ts'

const description = JSON.parse(
  await readFile(new URL('../../openapi/openapi.json', import.meta.url), 'utf8'),
) as ApiDescription
const { schemas } = description.components

function emptyForm() {
  return fieldOf('', schemas.TaskRunnerRequest ?? {}, schemas) ?? expect.fail()
}

test('the form has every field of the request that can be typed', () => {
  const paths = pathsOf(emptyForm())
  const own = Object.keys(schemas.TaskRunnerRequest?.properties ?? {})
  const config = Object.keys(schemas.WorkerConfig?.properties ?? {})
  // Takes nothing but null.
  const typed = config.filter((name) => name !== 'distributed_config')
  expect(paths).toEqual(expect.arrayContaining(own))
  expect(paths).toEqual(expect.arrayContaining(typed.map((name) => `worker_config.${name}`)))
  expect(paths).not.toContain('worker_config.distributed_config')
})

test('what is not typed is left out', () => {
  expect(requestOf(emptyForm())).toEqual({ worker_config: {} })
})

test('a request comes out as it was filled in', () => {
  const request = {
    task_id: 'one',
    task_file_name: 'hello.py',
    worker_config: {
      worker_size: 'Small',
      env_variables: { A: 'x', B: '1' },
      personal_secrets: ['first', 'second'],
      git_configs: [{ remote_url: 'https://git.example.com/repo.git', fetch_depth: 1 }],
      startup_script: 'echo 1\necho 2',
      image_config: { pull_policy: 'Never' },
      interactive: false,
    },
    callback_url: 'http://example.com/',
    terminate_on_completion: false,
    priority: 3,
  }
  expect(requestOf(filled(emptyForm(), request))).toEqual(request)
})

test('what the API masks is empty, and known to be so', () => {
  const form = filled(emptyForm(), {
    task_id: 'one',
    worker_config: { env_variables: { A: '***', B: '***' }, log_level: null },
    callback_url: 'http://example.com/?***',
  })
  expect(maskedPaths(form)).toEqual([
    'worker_config.env_variables.A',
    'worker_config.env_variables.B',
    'callback_url',
  ])
  expect(JSON.stringify(requestOf(form))).not.toContain('***')
})
