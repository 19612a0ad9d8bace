import { expect, test } from 'vitest'
import type { DeliveryStore, TaskStore, WorkerBackend } from '../../src/core/ports.ts'
import type { Task } from '../../src/core/task.ts'
import { Metrics } from '../../src/metrics/metrics.ts'
import { end } from '../store/contract.ts'

const FINISHED_AT = 5_000

/** The doors of the core, through which alone metrics see tasks end and attempts be made. */
function startScene() {
  // Hold: nothing else of the ports is called here.
  const tasks = { finish: async () => true, countLive: async () => [] } as unknown as TaskStore
  const deliveries = { recordAttempt: async () => {} } as unknown as DeliveryStore
  const backend = { list: async () => [] } as unknown as WorkerBackend
  const metrics = new Metrics({ tasks, backend, now: () => 0 })
  const store = metrics.tasks(tasks)
  const attempts = metrics.deliveries(deliveries)
  return {
    async finish(taskId: string) {
      const delivery = { webhookId: `msg_${taskId}`, origin: 'http://a.test', leaseUntil: null }
      // Holds: metrics look at no more of a task.
      const task = { taskId, startedAt: null } as Task
      await store.finish(task, end({ delivery, finishedAt: FINISHED_AT }))
    },
    async attempt(taskId: string, number: number) {
      await attempts.recordAttempt(
        taskId,
        {
          number,
          startedAt: FINISHED_AT + 2_000,
          durationMs: 1,
          statusCode: 200,
          error: null,
          manual: false,
        },
        { status: 'delivered', nextAttemptAt: null },
      )
    },
    /** How many callback delays were measured. */
    async delays() {
      const count = /^task_runner_callback_delay_seconds_count (\d+)$/m.exec(await metrics.text())
      return Number(count?.[1])
    },
  }
}

test('the callback delay goes on being measured where other instances make most first attempts', async () => {
  const scene = startScene()
  for (let others = 0; others < 10_001; others += 1) await scene.finish(`of-others-${others}`)
  await scene.finish('ours')
  await scene.attempt('ours', 1)
  expect(await scene.delays()).toBe(1)
})

test('the callback delay is that of the first attempt, and of no later one', async () => {
  const scene = startScene()
  await scene.finish('tried-by-others')
  await scene.attempt('tried-by-others', 2)
  expect(await scene.delays()).toBe(0)
  await scene.finish('ours')
  await scene.attempt('ours', 1)
  await scene.attempt('ours', 2)
  expect(await scene.delays()).toBe(1)
})
