import type { CoreV1Event, V1ContainerState, V1Job, V1Pod } from '@kubernetes/client-node'
import { describe, expect, test } from 'vitest'
import { observe, statusOf, warningOf } from '../../src/workers/kubernetes/observation.ts'

const NOW = Date.parse('2026-01-01T12:00:00Z')

const job = (conditions: object[] = [], spec: object = {}, metadata: object = {}) =>
  ({ metadata, spec, status: { conditions } }) as V1Job
const condition = (type: string, reason = '', message = '') => {
  return { type, status: 'True', reason, message }
}
const pod = (status: object, metadata: object = {}) => ({ metadata, status }) as V1Pod
const task = (state: V1ContainerState, more: object = {}) =>
  pod({ containerStatuses: [{ name: 'task', image: 'image:1', state }], ...more })
const ended = (exitCode: number, message = '', more: object = {}) =>
  task({ terminated: { exitCode, message, reason: exitCode ? 'Error' : 'Completed' } }, more)
const RUNNING = { running: {} }
const DISRUPTED = { conditions: [condition('DisruptionTarget', 'EvictionByEvictionAPI', 'bye')] }

const JOB = job()
const SUSPENDED = job([], { suspend: true })

describe('what is seen', () => {
  test.each<[string, V1Job | undefined, V1Pod | undefined, object]>([
    ['no pod yet', JOB, undefined, { phase: 'waiting', reason: 'provisioning_timeout' }],
    ['suspended', SUSPENDED, undefined, { phase: 'queued' }],
    ['a pod without a status', JOB, {}, { phase: 'waiting' }],
    ['a pod with an empty status', JOB, pod({}), { phase: 'waiting' }],
    [
      'a container without a state',
      JOB,
      pod({ containerStatuses: [{ name: 'task' }] }),
      { phase: 'waiting' },
    ],
    [
      'a pod being made',
      JOB,
      task({ waiting: { reason: 'ContainerCreating' } }),
      { phase: 'waiting', isHopeless: false },
    ],
    ['running', JOB, task(RUNNING), { phase: 'running' }],
    ['running, the Job deleted', undefined, task(RUNNING), { phase: 'running' }],
    [
      'another container ended, ours runs',
      JOB,
      pod({
        containerStatuses: [
          { name: 'sidecar', state: { terminated: { exitCode: 1 } } },
          { name: 'task', state: RUNNING },
        ],
      }),
      { phase: 'running' },
    ],
    [
      'our container ended, another runs',
      JOB,
      pod({
        phase: 'Running',
        containerStatuses: [
          { name: 'sidecar', state: RUNNING },
          { name: 'task', state: { terminated: { exitCode: 0, message: 'task 0\n' } } },
        ],
      }),
      { completion: { reason: 'completed' } },
    ],
    [
      'an exit code',
      JOB,
      ended(3, 'task 3\n'),
      { completion: { reason: 'exit_code', exitCode: 3 } },
    ],
    [
      'a clone that failed',
      JOB,
      ended(1, 'clone 128 no such repository\n'),
      { completion: { reason: 'startup_failed', message: 'no such repository' } },
    ],
    ['success without a word', JOB, ended(0), { completion: { reason: 'worker_lost' } }],
    [
      'words that are not ours',
      JOB,
      ended(0, 'task zero\n'),
      { completion: { reason: 'worker_lost' } },
    ],
    [
      'success in spite of a disruption',
      JOB,
      ended(0, 'task 0\n', DISRUPTED),
      { completion: { reason: 'completed' } },
    ],
    [
      'TERM by a disruption',
      JOB,
      ended(143, 'task 143\n', DISRUPTED),
      { completion: { reason: 'evicted' } },
    ],
    ['TERM by a queue', SUSPENDED, ended(143, 'task 143\n'), { completion: { reason: 'evicted' } }],
    [
      'TERM',
      JOB,
      ended(143, 'task 143\n'),
      { completion: { reason: 'signal', signal: 'SIGTERM' } },
    ],
    [
      'TERM by a node that shuts down',
      JOB,
      ended(143, 'task 143\n', { reason: 'Terminated' }),
      { completion: { reason: 'evicted' } },
    ],
    [
      'TERM by a node that is lost',
      JOB,
      ended(143, 'task 143\n', { reason: 'NodeLost' }),
      { completion: { reason: 'worker_lost' } },
    ],
    [
      'a deadline',
      JOB,
      ended(143, 'task 143\n', { reason: 'DeadlineExceeded' }),
      { completion: { reason: 'timed_out' } },
    ],
    [
      'a deadline before it ran',
      JOB,
      pod({ phase: 'Failed', reason: 'DeadlineExceeded' }),
      { completion: { reason: 'timed_out' } },
    ],
    [
      'evicted, no statuses',
      JOB,
      pod({ phase: 'Failed', reason: 'Evicted', message: 'low' }),
      { completion: { reason: 'evicted' } },
    ],
    [
      'failed, no statuses',
      JOB,
      pod({ phase: 'Failed' }),
      { completion: { reason: 'worker_lost' } },
    ],
    [
      'succeeded, no statuses',
      JOB,
      pod({ phase: 'Succeeded' }),
      { completion: { reason: 'worker_lost' } },
    ],
    [
      'unknown to its node',
      JOB,
      ended(137, '', { phase: 'Failed' }),
      { completion: { reason: 'worker_lost' } },
    ],
    [
      'the Job deleted',
      undefined,
      undefined,
      {
        completion: {
          reason: 'worker_lost',
          message: expect.stringMatching(/^The worker was deleted from outside/),
        },
      },
    ],
    [
      'the Job complete, no pod',
      job([condition('Complete')]),
      undefined,
      { completion: { reason: 'worker_lost' } },
    ],
    [
      'the Job disrupted, no pod',
      job([
        condition(
          'Failed',
          'PodFailurePolicy',
          'Pod a/b has condition DisruptionTarget matching FailJob rule at index 0',
        ),
      ]),
      undefined,
      { completion: { reason: 'evicted' } },
    ],
    [
      'the Job failed by code, no pod',
      job([
        condition(
          'Failed',
          'PodFailurePolicy',
          'Container task for pod a/b failed with exit code 7',
        ),
      ]),
      undefined,
      { completion: { reason: 'worker_lost', message: expect.stringContaining('exit code 7') } },
    ],
    [
      'the Job over its deadline, no pod',
      job([condition('Failed', 'DeadlineExceeded', 'too long')]),
      undefined,
      { completion: { reason: 'timed_out' } },
    ],
  ])('%s', (_, ofJob, ofPod, expected) => {
    expect(observe(ofJob, ofPod, NOW)).toMatchObject(expected)
  })

  test('a pod that should have gone is its node’s loss only when its grace period is long over', () => {
    const told = (at: string) =>
      pod({ containerStatuses: [{ name: 'task', state: RUNNING }] }, { deletionTimestamp: at })
    expect(observe(JOB, told('2026-01-01T11:59:45Z'), NOW)).toMatchObject({ phase: 'running' })
    expect(observe(JOB, told('2026-01-01T11:59:00Z'), NOW)).toMatchObject({
      completion: { reason: 'worker_lost', message: expect.stringMatching(/may still run there/) },
    })
  })

  test.each([
    ['ErrImagePull', 'connection refused', false],
    ['ImagePullBackOff', 'manifest unknown', true],
    ['ErrImagePull', 'pull access denied', true],
    ['InvalidImageName', '', true],
    ['ErrImageNeverPull', '', true],
  ])('of an image: %s, %s', (reason, message, isHopeless) => {
    const init = { name: 'files', image: 'image:1', state: { waiting: { reason, message } } }
    expect(observe(JOB, pod({ initContainerStatuses: [init] }), NOW)).toMatchObject({
      ...{ phase: 'waiting', reason: 'image_pull_failed', isHopeless },
      message: expect.stringContaining('image:1'),
    })
  })
})

test.each<[V1Job | undefined, V1Pod | undefined, string]>([
  [undefined, task(RUNNING), 'Terminating'],
  [job([], {}, { deletionTimestamp: '2026-01-01T00:00:00Z' }), task(RUNNING), 'Terminating'],
  [JOB, undefined, 'Provisioning'],
  [SUSPENDED, undefined, 'Provisioning'],
  [JOB, {}, 'Provisioning'],
  [JOB, task(RUNNING), 'Running'],
  [JOB, ended(1), 'Completed'],
  [job([condition('Failed')]), undefined, 'Completed'],
])('the status of worker %# is %3$s', (ofJob, ofPod, expected) => {
  expect(statusOf(ofJob, ofPod)).toBe(expected)
})

describe('what events warn of', () => {
  const event = (reason: string, message: string, minute: number, type = 'Warning') =>
    ({
      type,
      reason,
      message,
      lastTimestamp: `2026-01-01T12:0${minute}:00Z`,
    }) as unknown as CoreV1Event

  test('nothing', () => {
    expect(warningOf([])).toBeUndefined()
    expect(warningOf([event('Scheduled', 'assigned', 1, 'Normal')])).toBeUndefined()
    expect(warningOf([{} as CoreV1Event])).toBeUndefined()
  })

  test('the last is told, wherever it stands', () => {
    const events = [event('FailedMount', 'late', 2), event('FailedScheduling', 'early', 1)]
    expect(warningOf(events)).toMatchObject({
      reason: 'startup_failed',
      message: expect.stringContaining('FailedMount: late'),
    })
  })

  test.each([
    ['FailedCreate', 'exceeded quota: team', 'unschedulable'],
    ['FailedCreate', 'violates PodSecurity', 'startup_failed'],
    ['FailedAttachVolume', 'no such disk', 'startup_failed'],
    ['FailedScheduling', 'no nodes', undefined],
  ])('%s, %s', (reason, message, expected) => {
    expect(warningOf([event(reason, message, 1)])).toMatchObject({
      reason: expected,
      message: expect.stringContaining(`${reason}: ${message}`),
    })
  })
})
