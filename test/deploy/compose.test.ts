import { readFile } from 'node:fs/promises'
import { expect, test } from 'vitest'
import { parse } from 'yaml'
import { loadConfig } from '../../src/config.ts'

const DEPLOY = new URL('../../deploy/', import.meta.url)

test('the service takes every variable that the instances of compose.yaml are given', async () => {
  const { services } = parse(await readFile(new URL('compose.yaml', DEPLOY), 'utf8'))
  const values: Record<string, string> = {
    POSTGRES_PASSWORD: 'made-up',
    SEALING_KEY: Buffer.alloc(32).toString('base64'),
    API_TOKENS: 'made-up',
  }
  const env = Object.entries<string>(services.service.environment).map(([name, value]) => [
    name,
    value.replace(/\$\{(\w+):\?\}/g, (_, variable) => values[variable] ?? ''),
  ])
  expect(loadConfig({ HOST: '0.0.0.0', ...Object.fromEntries(env) })).toMatchObject({
    databaseUrl: 'postgres://task_runner:made-up@postgres/task_runner',
    workerBackend: 'docker',
    apiTokens: ['made-up'],
    sampleCallbacks: false,
  })
  expect(services.service.deploy.replicas).toBe(3)
})

test('the proxy sends on to the instances, at the port of the image', async () => {
  const proxy = await readFile(new URL('compose-proxy.conf', DEPLOY), 'utf8')
  const image = await readFile(new URL('../Dockerfile', DEPLOY), 'utf8')
  const port = /PORT=(\d+)/.exec(image)?.[1]
  expect(proxy).toContain(`http://service:${port};`)
})
