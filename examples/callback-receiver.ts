/**
 * Receives the callbacks of the task runner: `CALLBACK_SIGNING_SECRETS=whsec_… PORT=8080 node callback-receiver.ts`.
 * The secrets are those of the service, comma separated. In your own project: `npm install fastify` and this package.
 */
import Fastify, { type FastifyInstance } from 'fastify'
import { CallbackVerificationError, verifyCallback } from 'task-runner'

type Callback = ReturnType<typeof verifyCallback>

/** Ids of callbacks that were taken: the service repeats one whose answer got lost. The oldest are forgotten. */
const SEEN_MAX = 10_000
/** A log has up to 5 MB, and more as JSON. */
const BODY_BYTES_MAX = 64 * 1024 * 1024

function buildReceiver(
  secrets: readonly string[],
  handle: (callback: Callback) => Promise<void>,
): FastifyInstance {
  const app = Fastify({ bodyLimit: BODY_BYTES_MAX, logger: { level: 'warn' } })
  const seen = new Set<string>()
  // The signature is over the bytes as they came: parsed and written again they would differ.
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_, body, done) =>
    done(null, body),
  )

  app.post<{ Body: Buffer | undefined }>('/callback', async (request, reply) => {
    let callback: Callback
    try {
      callback = verifyCallback(request.headers, request.body ?? '', secrets)
    } catch (err) {
      if (!(err instanceof CallbackVerificationError)) throw err
      return reply.code(401).send({ success: false, message: err.message })
    }
    const id = String(request.headers['webhook-id'])
    if (!seen.has(id)) {
      seen.add(id)
      for (const oldest of seen) {
        if (seen.size <= SEEN_MAX) break
        seen.delete(oldest)
      }
      // Not awaited: an attempt that is not answered within seconds is repeated. What must survive a crash of this
      // process goes into a queue or database here, before the answer.
      void handle(callback).catch((err) => request.log.error({ err, id }, 'callback not handled'))
    }
    return { success: true }
  })
  return app
}

const secrets = process.env.CALLBACK_SIGNING_SECRETS?.split(',')
if (!secrets) throw new Error('CALLBACK_SIGNING_SECRETS is not set')
const receiver = buildReceiver(secrets, async ({ task_id, success, logs }) => {
  console.log(`${task_id} ${success ? 'succeeded' : 'failed'}\n${logs}`)
})
const address = await receiver.listen({ host: '127.0.0.1', port: Number(process.env.PORT ?? 8080) })
console.log(`listening on ${address}`)
