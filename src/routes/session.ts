import type { FastifyPluginAsyncZod } from 'fastify-type-provider-zod'
import { TaskRunnerError } from '../core/errors.ts'
import { doneSchema } from '../wire/responses.ts'
import { sessionSchema, signInSchema } from '../wire/session.ts'
import { type Authentication, TOKEN_COOKIE } from './authentication.ts'
import { answer, errorResponses } from './responses.ts'

/** A token has 4,096 characters at most; everybody may send one. */
const BODY_BYTES_MAX = 16 * 1024
const SIGNED_IN_SECONDS = 7 * 86_400

/** Signing in from a browser: the token lies in a cookie that no script can read, and that no other site can use. */
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
        summary: 'Is one signed in?',
        security: [],
        response: { ...answer('The session', sessionSchema) },
      },
    },
    async ({ cookies }) => {
      const needed = authentication.needsToken
      const token = cookies[TOKEN_COOKIE]
      const isRight = token !== undefined && (await authentication.knows(token))
      return { needed, signed_in: !needed || isRight }
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
        description: 'From now on the cookie that comes with the answer stands for the token.',
        security: [],
        body: signInSchema,
        response: { ...answer('Signed in', doneSchema), ...errorResponses(401, 413, 415, 422) },
      },
    },
    async ({ body, headers }, reply) => {
      if (!(await authentication.knows(body.token))) {
        throw new TaskRunnerError('unauthorized', 'The token is wrong')
      }
      reply.setCookie(TOKEN_COOKIE, body.token, {
        path,
        httpOnly: true,
        sameSite: 'strict',
        // TLS ends at a proxy. Each proxy adds the protocol of its caller; the first caller is the
        // browser.
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
        response: { ...answer('Signed out', doneSchema) },
      },
    },
    async (_, reply) => {
      reply.clearCookie(TOKEN_COOKIE, { path })
      return { success: true as const, message: 'Signed out' }
    },
  )
}
