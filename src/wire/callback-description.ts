const SCHEMAS = '#/components/schemas'

const header = (name: string, description: string, { required = false } = {}) => ({
  name,
  in: 'header',
  required,
  description,
  schema: { type: 'string' },
})

/**
 * Describes the callback of `runTask` in OpenAPI, so that receivers can be generated. `apiSecurity`
 * is the document's default, which callbacks override: they carry no API token.
 */
export function callbackDescription(apiSecurity: object | undefined) {
  return {
    '{$request.body#/callback_url}': {
      post: {
        ...(apiSecurity && { security: [] }),
        operationId: 'receiveOutcome',
        summary: 'The outcome of the task',
        description:
          'Sent when the task has ended, and retried until the receiver responds with a 2xx status. The same callback may arrive twice, with the same `webhook-id`.',
        parameters: [
          header('webhook-id', 'The same for every attempt', { required: true }),
          header('webhook-timestamp', 'When it was sent, in seconds since 1970', {
            required: true,
          }),
          header(
            'webhook-signature',
            'Standard Webhooks: one or more signatures, separated by spaces, each `v1,` and base64. Absent if the service has no signing secrets',
          ),
          header('authorization', '`Bearer` and the `callback_url_token` of the request, if any'),
          header('traceparent', 'W3C Trace Context: the `traceparent` of the request, if any'),
          header(
            'task-status',
            'The final status of the task. Not signed, like all `task-` headers',
            { required: true },
          ),
          header('task-reason', 'Why the task ended'),
          header('task-exit-code', 'Absent if the task did not exit by itself'),
          header('task-duration-ms', 'From start to end; absent if the task never started'),
        ],
        requestBody: {
          required: true,
          content: {
            'application/json': { schema: { $ref: `${SCHEMAS}/TaskRunnerCallbackRequest` } },
          },
        },
        responses: {
          200: {
            description: 'Received. Any 2xx status is accepted, and the body is ignored',
            content: {
              'application/json': { schema: { $ref: `${SCHEMAS}/TaskRunnerCallbackResponse` } },
            },
          },
        },
      },
    },
  }
}
