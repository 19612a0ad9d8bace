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

**Try it:** open *Run a task* below, press *Try it out*, then *Execute*. Then get the task, its log
and its worker. If the service requires a bearer token, press *Authorize* first.`

const zodToJsonConfig = { override: asPublished }
const jsonSchemaTransform = createJsonSchemaTransform({ zodToJsonConfig })
const jsonSchemaTransformObject = createJsonSchemaTransformObject({ zodToJsonConfig })

type Document = ReturnType<typeof jsonSchemaTransformObject>

/**
 * Publishes the OpenAPI document, generated from the schemas that validate requests, and Swagger UI
 * at `/docs`. Without `needsToken` the document has no security schemes.
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
        { name: 'Run', description: 'Run tasks' },
        { name: 'Tasks', description: 'Accepted tasks, their state and their logs' },
        { name: 'Callbacks', description: 'Delivery of outcomes to `callback_url`' },
        { name: 'Workers', description: 'The places where tasks run' },
        { name: 'Session', description: 'Sign in from a browser' },
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
    // FastAPI serves its document at this path, so tools look for it there.
    docs.get(`${basePath}/openapi.json`, { schema: { hide: true } }, () => app.swagger())
    // Swagger UI writes inline styles.
    await secureContent(docs, { inlineStyles: true })
    await docs.register(fastifySwaggerUi, {
      routePrefix: `${basePath}/docs`,
      // All URLs of the page are relative: a proxy may strip a prefix that the service does not
      // know.
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

/** Adjusts the JSON Schema that zod generates. */
function asPublished({
  zodSchema,
  jsonSchema,
}: {
  zodSchema: z.core.$ZodType
  jsonSchema: z.core.JSONSchema.BaseSchema
}): void {
  // zod omits the examples of schemas that preprocess a value, such as "" to null.
  const { examples } = z.globalRegistry.get(zodSchema) ?? {}
  if (Array.isArray(examples)) jsonSchema.examples ??= examples
  // A new field in a response must not break clients. Requests are strict objects.
  if (zodSchema instanceof z.ZodObject && zodSchema.def.catchall === undefined) {
    delete jsonSchema.additionalProperties
  }
  // The format is enough; the pattern has 300 characters.
  if (jsonSchema.format === 'date-time') delete jsonSchema.pattern
  if (jsonSchema.type === 'number') jsonSchema.format = 'double'
  if (jsonSchema.type === 'integer') {
    // zod adds the range of safe integers.
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
 * Adds what @fastify/swagger does not publish: callbacks, and which request bodies are optional.
 * Their schemas accept null, since a missing body is null in fastify.
 */
function completed(document: Document): Document {
  // Safe: a path item has only operations here, by their methods.
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
 * Removes unused components and the suffix `Input`. The library publishes each schema twice, `X`
 * for responses and `XInput` for requests. Throws if both are used and differ.
 */
function withPlainNames(document: Document): Document {
  // Safe: publishOpenApi generates OpenAPI 3, which has components.
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
    // Safe: only references change.
    JSON.parse(JSON.stringify(node), (_key, value) =>
      typeof value === 'string' && value.startsWith('#/components/schemas/')
        ? `#/components/schemas/${plain(value.slice(21))}`
        : value,
    ) as T
  const kept: Record<string, unknown> = {}
  for (const name of [...used].sort()) {
    const schema = renamed(schemas.get(name))
    if (!isDeepStrictEqual(kept[plain(name)] ?? schema, schema)) {
      throw new Error(`${plain(name)} differs between requests and responses`)
    }
    kept[plain(name)] = schema
  }
  // Safe: the document keeps all its other fields.
  return { ...renamed(rest), components: { ...components, schemas: kept } } as Document
}
