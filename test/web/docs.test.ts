import { createServer, request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startApp, type TestApp } from '../helpers/app.ts'
import { whyNot } from '../helpers/programs.ts'
import { launch, openPage } from './browser.ts'

const skipped = whyNot('chromium')

/** Passes on what lies below `prefix`, without it, as `location /runner/ { proxy_pass http://service/; }` of nginx. */
async function startStrippingProxy(prefix: string, service: string) {
  const server = createServer((incoming, response) => {
    if (!incoming.url?.startsWith(`${prefix}/`)) return response.writeHead(404).end()
    const { method, headers } = incoming
    const passed = request(service + incoming.url.slice(prefix.length), { method, headers })
    passed.on('response', (answer) => {
      response.writeHead(answer.statusCode ?? 502, answer.headers)
      answer.pipe(response)
    })
    return incoming.pipe(passed)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}${prefix}`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

describe.skipIf(skipped)(`Swagger UI${skipped ? `: ${skipped}` : ''}`, () => {
  let browser: Awaited<ReturnType<typeof launch>>
  const apps: TestApp[] = []

  const listening = async (env: Record<string, string> = {}) => {
    const app = await startApp(env)
    apps.push(app)
    return app.http.listen({ host: '127.0.0.1', port: 0 })
  }
  /** Calls `GET /health/live` with "Try it out", and returns the URL that it called. */
  const tryItOut = async (url: string) => {
    const { page, troubles } = await openPage(browser, url)
    await page.locator('#operations-Health-live').click()
    await page.getByRole('button', { name: 'Try it out' }).click()
    await page.getByRole('button', { name: 'Execute' }).click()
    await page.locator('.live-responses-table .response-col_status').getByText('200').waitFor()
    const called = await page.locator('.request-url pre').innerText()
    expect(troubles).toEqual([])
    await page.context().close()
    return called.trim()
  }

  beforeAll(async () => {
    browser = await launch()
  })
  afterAll(async () => {
    await browser?.close()
    for (const app of apps) await app[Symbol.asyncDispose]()
  })

  test('it shows and calls the service where that is', async () => {
    const url = await listening()
    expect(await tryItOut(`${url}/docs`)).toBe(`${url}/health/live`)
  })

  test('… below a BASE_PATH', async () => {
    const url = `${await listening({ BASE_PATH: '/apps/runner' })}/apps/runner`
    expect(await tryItOut(`${url}/docs`)).toBe(`${url}/health/live`)
  })

  test('… below a prefix that a proxy strips', async () => {
    await using proxy = await startStrippingProxy('/team/runner', await listening())
    expect(await tryItOut(`${proxy.url}/docs`)).toBe(`${proxy.url}/health/live`)
    expect(await tryItOut(`${proxy.url}/docs/`)).toBe(`${proxy.url}/health/live`)
  })
})
