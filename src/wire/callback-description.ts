const SCHEMAS = '#/components/schemas'

const header = (name: string, description: string, options: { required?: true } = {}) => ({
  ...{ name, in: 'header', required: false, description, schema: { type: 'string' } },
  ...options,
})

/**
 * Describes the callback of `runTask` in OpenAPI, so that receivers can be generated. `apiSecurity`: what the API's own
 * operations want by default, which is not what receivers want.
 */
export function callbackDescription(apiSecurity: object | undefined) {
  return {
    '{$request.body#/callback_url}': {
      post: {
        ...(apiSecurity && { security: [] }),
        operationId: 'receiveOutcome',
        summary: 'The outcome of the task',
        description:
          'Sent by the service once the task has ended, and again until an answer has a status of 2xx. The same callback may come twice, with the same `webhook-id`.',
        parameters: [
          header('webhook-id', 'The same for every attempt', { required: true }),
          header('webhook-timestamp', 'When it was sent, in seconds since 1970', {
            required: true,
          }),
          header(
            'webhook-signature',
            'Standard Webhooks: `v1,` and a signature in base64, several with spaces between. Only where the service has signing secrets',
          ),
          header('authorization', '`Bearer` and the `callback_url_token`, where there is one'),
          header('traceparent', 'W3C Trace Context, where the request brought one'),
          header(
            'task-status',
            'How the task ended, as its record says. Not signed, like all `task-` headers',
            {
              required: true,
            },
          ),
          header('task-reason', 'Why it ended so'),
          header('task-exit-code', 'Where it ended by itself'),
          header('task-duration-ms', 'From its start to its end, where it was started'),
        ],
        requestBody: {
          required: true,
          content: {
            'application/json': { schema: { $ref: `${SCHEMAS}/TaskRunnerCallbackRequest` } },
          },
        },
        responses: {
          200: {
            description: 'Received. Any status of 2xx will do, and the body is not looked at',
            content: {
              'application/json': { schema: { $ref: `${SCHEMAS}/TaskRunnerCallbackResponse` } },
            },
          },
        },
      },
    },
  }
}
