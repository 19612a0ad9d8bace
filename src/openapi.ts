import { isDeepStrictEqual } from 'node:util'
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
import { callbackDescription } from './wire/callback-description.ts'

const DESCRIPTION = `Runs scripts on on-demand workers and calls back with the outcome.

**Try it:** open *Run a task* below, press *Try it out*, then *Execute*. Then look at the task, its log, and its worker.
Where the service wants a bearer token, press *Authorize* first.`

/** How zod's schemas are published. */
const zodToJsonConfig = { override: asPublished }
const jsonSchemaTransform = createJsonSchemaTransform({ zodToJsonConfig })
const jsonSchemaTransformObject = createJsonSchemaTransformObject({ zodToJsonConfig })

type Document = ReturnType<typeof jsonSchemaTransformObject>

/**
 * Publishes the API's description, made from the schemas that validate; `/docs` shows it. Without `needsToken` nothing in it
 * speaks of security.
 */
export async function publishOpenApi(
  app: FastifyInstance,
  { basePath, needsToken }: { basePath: string; needsToken: boolean },
): Promise<void> {
  await app.register(fastifySwagger, {
    openapi: {
      openapi: '3.1.0',
      info: { title: 'Task runner', description: DESCRIPTION, version: VERSION },
      servers: [{ url: basePath === '' ? '/' : basePath }],
      tags: [
        { name: 'Run', description: 'The main job' },
        { name: 'Tasks', description: 'What was accepted, and how it went' },
        { name: 'Callbacks', description: 'Where outcomes are POSTed, attempt by attempt' },
        { name: 'Workers', description: 'Where tasks run' },
        { name: 'Session', description: 'Signing in from a browser' },
        { name: 'Health', description: 'For load balancers and orchestrators' },
        { name: 'Samples', description: 'Receivers to try callbacks with' },
      ],
      ...(needsToken && {
        components: { securitySchemes: { bearer: { type: 'http', scheme: 'bearer' } } },
        security: [{ bearer: [] }],
      }),
    },
    stripBasePath: true,
    transform: (route) => {
      const transformed = jsonSchemaTransform(route)
      if (!needsToken) delete transformed.schema?.security
      return transformed
    },
    transformObject: (document) => withPlainNames(completed(jsonSchemaTransformObject(document))),
  })
  await app.register(async (docs) => {
    // Where FastAPI has it, and tools look for it.
    docs.get(`${basePath}/openapi.json`, { schema: { hide: true } }, () => app.swagger())
    // Swagger UI writes inline styles.
    await secureContent(docs, { inlineStyles: true })
    await docs.register(fastifySwaggerUi, {
      routePrefix: `${basePath}/docs`,
      // The page and what it calls are found from its own address, since a proxy may have stripped a
      // prefix that nobody told us of.
      uiHooks: {
        onRequest: (request, reply, done) => {
          if (/\/docs(\?|$)/.test(request.url)) reply.redirect('docs/')
          else done()
        },
      },
      transformSpecification: (document) => ({ ...document, servers: [{ url: '..' }] }),
      transformSpecificationClone: false,
      uiConfig: { docExpansion: 'list', displayRequestDuration: true },
      theme: {
        title: 'Task runner',
        css: [{ filename: 'theme.css', content: '.swagger-ui .topbar { display: none }' }],
      },
    })
  })
}

/** Changes the JSON Schema that zod makes of one schema. */
function asPublished({
  zodSchema,
  jsonSchema,
}: {
  zodSchema: z.core.$ZodType
  jsonSchema: z.core.JSONSchema.BaseSchema
}): void {
  // zod leaves them out where anything inside takes other spellings of a value, such as "" for null.
  const { examples } = z.globalRegistry.get(zodSchema) ?? {}
  if (Array.isArray(examples)) jsonSchema.examples ??= examples
  // A field that is added to an answer must not break a client. Requests are strict objects.
  if (zodSchema instanceof z.ZodObject && zodSchema.def.catchall === undefined) {
    delete jsonSchema.additionalProperties
  }
  // The format says it; the pattern has 300 characters.
  if (jsonSchema.format === 'date-time') delete jsonSchema.pattern
  if (jsonSchema.type === 'number') jsonSchema.format = 'double'
  if (jsonSchema.type === 'integer') {
    // zod publishes the range of JavaScript's numbers.
    if (jsonSchema.minimum === Number.MIN_SAFE_INTEGER) delete jsonSchema.minimum
    if (jsonSchema.maximum === Number.MAX_SAFE_INTEGER) delete jsonSchema.maximum
    jsonSchema.format = (jsonSchema.maximum ?? Infinity) < 2 ** 31 ? 'int32' : 'int64'
  }
}

interface Operation {
  operationId?: string
  requestBody?: { required: boolean; content: Record<string, { schema: BodySchema }> }
  callbacks?: object
}
interface BodySchema {
  type?: string
  anyOf?: BodySchema[]
}

/**
 * Adds what @fastify/swagger does not publish: the headers of callbacks, and which bodies may be left out. A missing body is
 * null to fastify.
 */
function completed(document: Document): Document {
  // Holds: what lies below a path is its operations, by their methods.
  const paths = Object.values(document.paths ?? {}) as Array<Record<string, Operation>>
  for (const operation of paths.flatMap((path) => Object.values(path))) {
    if (operation.operationId === 'runTask') {
      operation.callbacks = { outcome: callbackDescription(document.security) }
    }
    const { requestBody } = operation
    for (const media of Object.values(requestBody?.content ?? {})) {
      const [schema, none] = media.schema.anyOf ?? []
      if (!requestBody || !schema || none?.type !== 'null') continue
      requestBody.required = false
      media.schema = schema
    }
  }
  return document
}

/**
 * Gives components their plain names. zod's JSON Schema differs between what is read and what is written, so the library
 * publishes each schema twice, as `X` and `XInput`. Keeps those that are used; throws where a request and an answer use one
 * schema that differs between them.
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
  const renamed = <T>(node: T): T =>
    // Holds: only references change.
    JSON.parse(JSON.stringify(node), (_key, value) =>
      typeof value === 'string' && value.startsWith('#/components/schemas/')
        ? `#/components/schemas/${plain(value.slice(21))}`
        : value,
    ) as T
  const kept: Record<string, unknown> = {}
  for (const name of [...used].sort()) {
    const schema = renamed(schemas.get(name))
    if (!isDeepStrictEqual(kept[plain(name)] ?? schema, schema)) {
      throw new Error(`${plain(name)} differs between requests and answers`)
    }
    kept[plain(name)] = schema
  }
  // Holds: it has all that the document had.
  return { ...renamed(rest), components: { ...components, schemas: kept } } as Document
}
