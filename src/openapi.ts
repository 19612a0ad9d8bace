import fastifySwagger from '@fastify/swagger'
import fastifySwaggerUi from '@fastify/swagger-ui'
import type { FastifyInstance } from 'fastify'
import {
  createJsonSchemaTransform,
  createJsonSchemaTransformObject,
} from 'fastify-type-provider-zod'
import { z } from 'zod'
import { secureContent } from './content-security.ts'
import { VERSION } from './version.ts'

const DESCRIPTION = `Runs scripts on on-demand workers and calls back with the outcome.

**Try it:** open *Run a task* below, press *Try it out*, then *Execute*. Then look at the task, its log, and its worker.
Where the service wants a bearer token, press *Authorize* first.`

/** How zod's schemas are told. */
const zodToJsonConfig = {
  override({
    zodSchema,
    jsonSchema,
  }: {
    zodSchema: z.core.$ZodType
    jsonSchema: { examples?: unknown[] }
  }) {
    // zod leaves them out where anything inside takes other spellings of a value, such as "" for null.
    const { examples } = z.globalRegistry.get(zodSchema) ?? {}
    if (Array.isArray(examples)) jsonSchema.examples ??= examples
  },
}
const jsonSchemaTransform = createJsonSchemaTransform({ zodToJsonConfig })
const jsonSchemaTransformObject = createJsonSchemaTransformObject({ zodToJsonConfig })

type Document = ReturnType<typeof jsonSchemaTransformObject>

/** The API's description, made from the schemas that validate; `/docs` shows it. */
export async function publishOpenApi(
  app: FastifyInstance,
  options: { basePath: string },
): Promise<void> {
  await app.register(fastifySwagger, {
    openapi: {
      openapi: '3.1.0',
      info: { title: 'Task runner', description: DESCRIPTION, version: VERSION },
      servers: [{ url: options.basePath === '' ? '/' : options.basePath }],
      tags: [
        { name: 'Run', description: 'The main job' },
        { name: 'Tasks', description: 'What was accepted, and how it went' },
        { name: 'Callbacks', description: 'Where outcomes are POSTed, attempt by attempt' },
        { name: 'Workers', description: 'Where tasks run' },
        { name: 'Session', description: 'Signing in from a browser' },
        { name: 'Health', description: 'For load balancers and orchestrators' },
        { name: 'Samples', description: 'Receivers to try callbacks with' },
      ],
      components: {
        securitySchemes: { bearer: { type: 'http', scheme: 'bearer' } },
      },
      security: [{ bearer: [] }],
    },
    stripBasePath: true,
    transform: jsonSchemaTransform,
    transformObject: (document) => withPlainNames(jsonSchemaTransformObject(document)),
  })
  await app.register(async (docs) => {
    // Where FastAPI has it, and tools look for it.
    docs.get(`${options.basePath}/openapi.json`, { schema: { hide: true } }, () => app.swagger())
    // Swagger UI writes inline styles.
    await secureContent(docs, { inlineStyles: true })
    await docs.register(fastifySwaggerUi, {
      routePrefix: `${options.basePath}/docs`,
      uiConfig: { docExpansion: 'list', displayRequestDuration: true },
      theme: {
        title: 'Task runner',
        css: [{ filename: 'theme.css', content: '.swagger-ui .topbar { display: none }' }],
      },
    })
  })
}

/**
 * zod's JSON Schema differs between what is read and what is written, so the library publishes each schema
 * twice, as `X` and `XInput`. Ours are only ever one of the two: keeps those that are used, under plain names.
 */
function withPlainNames(document: Document): Document {
  // Holds: publishOpenApi asks for OpenAPI 3, which has components.
  const { components, ...rest } = document as { components?: { schemas?: object } }
  const schemas = new Map(Object.entries(components?.schemas ?? {}))
  const used = new Set<string>()
  const visit = (node: unknown): void => {
    for (const [, name] of JSON.stringify(node).matchAll(/"#\/components\/schemas\/(\w+)"/g)) {
      if (name === undefined || used.has(name)) continue
      used.add(name)
      visit(schemas.get(name))
    }
  }
  visit(rest)
  const plain = (name: string) =>
    schemas.has(name.replace(/Input$/, '')) ? name.replace(/Input$/, '') : name
  const kept = [...used].sort().map((name) => [plain(name), schemas.get(name)] as const)
  if (new Set(kept.map(([name]) => name)).size !== kept.length) {
    throw new Error('a schema is used both in requests and in answers')
  }
  const whole = { ...rest, components: { ...components, schemas: Object.fromEntries(kept) } }
  // Holds: only references were renamed.
  return JSON.parse(JSON.stringify(whole), (_key, value) =>
    typeof value === 'string' && value.startsWith('#/components/schemas/')
      ? `#/components/schemas/${plain(value.slice(21))}`
      : value,
  ) as Document
}
