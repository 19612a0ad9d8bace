import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { TaskRunnerError } from '../core/errors.ts'
import { doneSchema } from '../wire/responses.ts'
import { sessionSchema, signInSchema } from '../wire/session.ts'
import { type Authentication, TOKEN_COOKIE } from './authentication.ts'
import { errorResponses, okResponse } from './responses.ts'

/** Maximum bytes of a body, which anyone may send. A token has at most 4,096 characters. */
const BODY_BYTES_MAX = 16 * 1024
const SIGNED_IN_SECONDS = 7 * 86_400

/** Routes to sign in from a browser. Scripts cannot read the cookie; other sites cannot use it. */
export const sessionRoutes: FastifyPluginAsyncZod<{
  authentication: Authentication
  basePath: string
}> = async (app, { authentication, basePath }) => {
  const path = `${basePath}/`

  app.get(
    '/session',
    {
      schema: {
        tags: ['Session'],
        operationId: 'getSession',
        summary: 'Get the state of the browser session',
        security: [],
        response: { ...okResponse('The session', sessionSchema) },
      },
    },
    async ({ cookies }) => {
      const needed = authentication.needsToken
      const token = cookies[TOKEN_COOKIE]
      const isValid = token !== undefined && (await authentication.knows(token))
      return { needed, signed_in: !needed || isValid }
    },
  )

  app.post(
    '/session',
    {
      bodyLimit: BODY_BYTES_MAX,
      schema: {
        tags: ['Session'],
        operationId: 'signIn',
        summary: 'Sign in',
        description: 'Sets a cookie that authenticates later requests in place of the token.',
        security: [],
        body: signInSchema,
        response: { ...okResponse('Signed in', doneSchema), ...errorResponses(401, 413, 415, 422) },
      },
    },
    async ({ body, headers }, reply) => {
      if (!(await authentication.knows(body.token))) {
        throw new TaskRunnerError('unauthorized', 'The token is invalid')
      }
      reply.setCookie(TOKEN_COOKIE, body.token, {
        path,
        httpOnly: true,
        sameSite: 'strict',
        // TLS ends at a proxy. Each proxy appends its client's protocol, so the first is the
        // browser's.
        secure: /^https\b/i.test(String(headers['x-forwarded-proto'])),
        maxAge: SIGNED_IN_SECONDS,
      })
      return { success: true as const, message: 'Signed in' }
    },
  )

  app.delete(
    '/session',
    {
      schema: {
        tags: ['Session'],
        operationId: 'signOut',
        summary: 'Sign out',
        security: [],
        response: { ...okResponse('Signed out', doneSchema) },
      },
    },
    async (_, reply) => {
      reply.clearCookie(TOKEN_COOKIE, { path })
      return { success: true as const, message: 'Signed out' }
    },
  )
}
