import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'

const BUILT = new URL('../../dist/web/', import.meta.url).pathname
const COMPRESSED_BYTES_MAX = 40 * 1024

test('the page is small, and holds nothing inline and nothing from elsewhere', async () => {
  const names = (await readdir(BUILT, { recursive: true })).filter((name) => name.endsWith('.gz'))
  const sizes = await Promise.all(names.map(async (name) => (await stat(join(BUILT, name))).size))
  expect(sizes).toHaveLength(3)
  expect(sizes.reduce((sum, size) => sum + size)).toBeLessThan(COMPRESSED_BYTES_MAX)

  const html = await readFile(join(BUILT, 'index.html'), 'utf8')
  expect(html).not.toMatch(/<style|style=|<script(?![^>]* src="\.\/assets\/)|(src|href)="(http|\/)/)

  // As for development it would name the files it was made from.
  const [script = ''] = names.filter((name) => name.endsWith('.js.gz'))
  const code = await readFile(join(BUILT, script.replace(/\.gz$/, '')), 'utf8')
  expect(code).toContain('task-runner-theme')
  expect(code).not.toContain('/web/src/')
})
