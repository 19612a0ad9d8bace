import { expect } from 'vitest'
import type { Answer } from './target.ts'

/** The API's one error shape; with `field`, one of its errors is about the field of that name. */
export function expectError(answer: Answer, status: number, field?: string): void {
  expect(answer.status, answer.text).toBe(status)
  expect(answer.headers.get('content-type')).toMatch(/^application\/json/)
  const { errors, ...rest } = answer.body
  expect(rest).toEqual({
    success: false,
    code: expect.stringMatching(/^[a-z_]+$/),
    message: expect.stringMatching(/\S/),
  })
  if (errors !== undefined) {
    expect(errors).toBeInstanceOf(Array)
    for (const error of errors as unknown[]) {
      expect(error).toEqual({ path: expect.any(String), message: expect.stringMatching(/\S/) })
    }
  }
  if (field !== undefined) expect(fieldsOf(answer), answer.text).toContain(field)
}

/** Every name in the paths of its errors: `worker_config.git_configs.0.branch` gives four. */
function fieldsOf({ body }: Answer): string[] {
  const errors = (body.errors ?? []) as Array<{ path: string }>
  return errors.flatMap(({ path }) => path.split(/[.[\]]+/))
}

/** `{success: true, message}` and `more`, nothing else. */
export function expectDone(answer: Answer, more: object = {}): void {
  expect(answer.status, answer.text).toBe(200)
  expect(answer.body).toEqual({ success: true, message: expect.stringMatching(/\S/), ...more })
}

export function expectAccepted(answer: Answer, taskId: string): void {
  expect(answer.status, answer.text).toBe(200)
  expect(answer.body).toEqual({
    success: true,
    message: 'Started Task successfully',
    task_id: taskId,
  })
}
