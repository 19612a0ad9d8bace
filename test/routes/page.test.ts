import { expect, test } from 'vitest'
import { startApp } from '../helpers/app.ts'

test.each(['', '/apps/runner'])('the page is served at "%s/", to anybody', async (basePath) => {
  await using app = await startApp({ API_TOKENS: 'a-token', BASE_PATH: basePath })
  const page = await app.http.inject({ method: 'GET', url: `${basePath}/` })
  expect(page.statusCode).toBe(200)
  expect(page.headers).toMatchObject({
    'content-type': expect.stringContaining('text/html'),
    'cache-control': 'public, max-age=0',
    'content-security-policy': expect.stringMatching(/^default-src 'none';script-src 'self';/),
  })
  expect(page.headers['content-security-policy']).not.toContain('unsafe')
  const assets = [...page.body.matchAll(/(?:src|href)="\.\/(assets\/[^"]+)"/g)].map(([, at]) => at)
  expect(assets.length).toBeGreaterThan(1)
  for (const asset of assets) {
    const reply = await app.http.inject({ method: 'GET', url: `${basePath}/${asset}` })
    expect(reply.statusCode, asset).toBe(200)
    expect(reply.headers['cache-control']).toBe('public, max-age=31536000, immutable')
  }
})

test('without its slash the page could not find its parts: it is led there', async () => {
  await using app = await startApp({ BASE_PATH: '/apps/runner' })
  const reply = await app.http.inject({ method: 'GET', url: '/apps/runner' })
  expect(reply.headers.location).toBe('/apps/runner/')
})

test.each(['..%2f..%2fpackage.json', '../index.html', '.%00', 'assets'])(
  'nothing else is served: assets/%s',
  async (path) => {
    await using app = await startApp()
    const reply = await app.http.inject({ method: 'GET', url: `/assets/${path}` })
    expect(reply.statusCode).toBeGreaterThanOrEqual(400)
  },
)
