import { expect, test } from 'vitest'
import type { Task } from '../../src/core/task.ts'
import {
  fromTask,
  fromTaskSummary,
  taskSchema,
  taskSummarySchema,
} from '../../src/wire/responses.ts'

const task: Task = {
  ...{ seq: 1, taskId: 'a', taskFileName: 'a.sh', status: 'queued', reason: null, message: null },
  ...{ exitCode: null, signal: null, workerName: 'task-a', terminateOnCompletion: true },
  ...{ timeoutSeconds: 1, priority: 0, claim: 0, instance: null, traceparent: null },
  ...{ createdAt: 0, claimedAt: null, startedAt: null, finishedAt: null, logBytes: null },
  waitingFor: null,
  ...{ callbackStatus: 'none', workerConfig: {}, callbackUrl: null, callbackUrlToken: null },
  secretValues: [],
}

test('what a task waits for is in its record and in the list; null: nothing hinders it', () => {
  const waitingFor = 'The Docker engine does not answer (ECONNREFUSED)'
  const waiting = { ...task, waitingFor }
  expect(taskSchema.parse(fromTask(waiting)).waiting_for).toBe(waitingFor)
  expect(taskSummarySchema.parse(fromTaskSummary(waiting)).waiting_for).toBe(waitingFor)
  expect(fromTask(task).waiting_for).toBeNull()
  expect(fromTaskSummary(task).waiting_for).toBeNull()
})
