import { posix } from 'node:path'
import { z } from 'zod'
import type { TaskRequest } from '../core/task.ts'
import { TASK_FILE_EXTENSIONS } from '../core/task-files.ts'
import { CONTROL, line } from './fields.ts'
import { type BackendRules, toWorkerConfig, workerConfigSchema } from './worker-config.ts'

/** Returns a pattern that excludes the paths `.` and `..`. */
const NO_DOTS = (others: string) => `(?:\\.*[^.${others}][^${others}]*|\\.{3,})`
const ENDING = new RegExp(`(?:${TASK_FILE_EXTENSIONS.join('|').replaceAll('.', '\\.')})$`)
const IN_PATH = `/\\\\${CONTROL}`

/** Path of a task file below the tasks folder or a repository. */
export const taskFileName = line(512, {
  pattern: new RegExp(`^(?:${NO_DOTS(IN_PATH)}/)*[^${IN_PATH}]*${ENDING.source}`),
  message: (name) =>
    ENDING.test(name)
      ? 'must be a plain relative path inside the tasks folder'
      : `must end in ${TASK_FILE_EXTENSIONS.join(', ')}`,
})

const taskId = line(255, {
  pattern: new RegExp(`^${NO_DOTS(CONTROL)}$`),
  message: () => 'must not be a relative path',
})

const callbackUrl = z
  .string()
  .max(4096)
  .superRefine((value, context) => {
    const wrong = (message: string) => context.addIssue({ code: 'custom', message })
    const url = URL.parse(value)
    if (!url) wrong('is not a URL')
    else if (url.protocol !== 'http:' && url.protocol !== 'https:') wrong('must be http or https')
    else if (url.username !== '' || url.password !== '') {
      wrong('must not contain a user name or password; use callback_url_token')
    }
  })

/** A token. Some receivers use characters that RFC 6750, section 2.1, excludes: `12|AbCd`. */
const bearerToken = z
  .string()
  .max(8192)
  .regex(/^[!-~]+$/, 'must be visible ASCII characters, without spaces')

/** Returns the schema of a field whose empty text and null mean that it is absent. */
function optionalText<T extends z.ZodType>(schema: T) {
  const orNull = (value: z.input<T> | null) => (value === '' ? null : value)
  return z.preprocess(orNull, schema.nullable()).optional()
}

/** Returns the schema of `POST /task-runner`. `timeoutSecondsMax` is the operator's upper limit. */
export function taskRequestSchema(timeoutSecondsMax: number) {
  return z
    .strictObject({
      task_id: taskId.describe(
        'Your name for this run, and its idempotency key: the same id with the same request starts nothing new',
      ),
      task_file_name: taskFileName.describe(
        `A file of the tasks folder (${TASK_FILE_EXTENSIONS.join(' ')})`,
      ),
      worker_config: workerConfigSchema,
      callback_url: optionalText(callbackUrl).describe('Where the outcome is POSTed'),
      callback_url_token: optionalText(bearerToken).describe(
        'Sent to the callback URL as `Authorization: Bearer …`; never shown again',
      ),
      terminate_on_completion: z
        .boolean()
        .nullish()
        .describe('Default true. False keeps the worker after the task, for debugging'),
      timeout_seconds: z
        .int()
        .min(1)
        .max(timeoutSecondsMax)
        .nullish()
        .describe('How long the task may run'),
      priority: z
        .int()
        .min(0)
        .max(9)
        .nullish()
        .describe(
          'Default 0; 9 runs first. Each level is worth a minute of waiting, so no task waits forever',
        ),
    })
    .meta({
      id: 'TaskRunnerRequest',
      description: 'A task to run. Every optional field may be null.',
      examples: [
        {
          task_id: 'my-first-task',
          task_file_name: 'parameters.sh',
          worker_config: { env_variables: { MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: 123 } },
          callback_url: null,
          callback_url_token: null,
          terminate_on_completion: true,
        },
      ],
    })
}

/** Removes the fragment, which is never sent but may hold a secret, and normalizes the URL. */
function withoutFragment(callbackUrl: string): string {
  const url = new URL(callbackUrl)
  url.hash = ''
  return url.href
}

/** Maps wire to domain. Throws `invalid_request`, also for fields the backend does not support. */
export function toTaskRequest(
  wire: z.output<ReturnType<typeof taskRequestSchema>>,
  rules: BackendRules,
): TaskRequest {
  return {
    taskId: wire.task_id,
    taskFileName: posix.normalize(wire.task_file_name),
    workerConfig: toWorkerConfig(wire.worker_config, { path: ['worker_config'], rules }),
    callbackUrl: wire.callback_url == null ? null : withoutFragment(wire.callback_url),
    callbackUrlToken: wire.callback_url_token ?? null,
    terminateOnCompletion: wire.terminate_on_completion ?? true,
    timeoutSeconds: wire.timeout_seconds ?? null,
    priority: wire.priority ?? undefined,
  }
}
