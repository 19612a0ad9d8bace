import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import fastifyStatic from '@fastify/static'
import type { FastifyInstance } from 'fastify'
import { secureContent } from './content-security.ts'
import { TaskRunnerError } from './core/errors.ts'

/** Made by `npm run build` from `web/`; the same place as seen from `src/` and from `dist/`. */
const BUILT = fileURLToPath(new URL('../dist/web/', import.meta.url))

/** Serves the web page at the root. What it shows it asks of the API, so the page itself is open. */
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
        // Their names change with their content.
        immutable: true,
        maxAge: '1y',
        preCompressed: true,
      })
    }
    page.get(`${basePath}/`, { schema: { hide: true } }, (request, reply) => {
      // The page names its parts relative to its own folder.
      const [path, query] = request.url.split('?', 2)
      if (!path?.endsWith('/')) {
        return reply.redirect(`${basePath}/${query === undefined ? '' : `?${query}`}`)
      }
      if (!existsSync(BUILT)) {
        throw new TaskRunnerError('not_found', 'The web page is not built: npm run build')
      }
      return reply.sendFile('index.html', BUILT, { immutable: false, maxAge: 0 })
    })
  })
}
