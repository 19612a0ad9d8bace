import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import fastifyStatic from '@fastify/static'
import type { FastifyInstance } from 'fastify'
import { secureContent } from './content-security.ts'
import { TaskRunnerError } from './core/errors.ts'

/** Folder that `npm run build` writes the page to; the path is the same from `src/` and `dist/`. */
const BUILT = fileURLToPath(new URL('../dist/web/', import.meta.url))

/** Serves the web page at the root. It needs no token, because it reads all data from the API. */
export async function servePage(
  app: FastifyInstance,
  options: { basePath: string },
): Promise<void> {
  const { basePath } = options
  await app.register(async (page) => {
    await secureContent(page, { inlineStyles: false })
    if (existsSync(BUILT)) {
      await page.register(fastifyStatic, {
        root: `${BUILT}assets`,
        prefix: `${basePath}/assets/`,
        wildcard: false,
        // File names contain a hash of the content.
        immutable: true,
        maxAge: '1y',
        preCompressed: true,
      })
    }
    page.get(`${basePath}/`, { schema: { hide: true } }, (request, reply) => {
      // The page refers to its assets by relative paths.
      const [path, query] = request.url.split('?', 2)
      if (!path?.endsWith('/')) {
        return reply.redirect(`${basePath}/${query === undefined ? '' : `?${query}`}`)
      }
      if (!existsSync(BUILT)) {
        throw new TaskRunnerError('not_found', 'The web page is not built; run npm run build')
      }
      return reply.sendFile('index.html', BUILT, { immutable: false, maxAge: 0 })
    })
  })
}
