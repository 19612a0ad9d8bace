import { expect, test } from 'vitest'
import type { TaskSummary } from '../../web/src/api.ts'
import { listed, withFirstPage, withFresh, withNextPage } from '../../web/src/task-list.ts'

/** Of what a list needs; a higher number is newer. */
function task(number: number, status: TaskSummary['status'] = 'succeeded'): TaskSummary {
  const created_at = new Date(number * 1000).toISOString()
  return { task_id: `task-${number}`, status, created_at } as TaskSummary
}
const page = (numbers: number[], next_cursor: string | null = null) => ({
  tasks: numbers.map((number) => task(number)),
  next_cursor,
})
const ids = (tasks: readonly TaskSummary[]) => tasks.map(({ task_id }) => task_id)

test('news of known tasks goes in place, and new tasks wait', () => {
  const before = listed({ tasks: [task(2, 'running'), task(1)], next_cursor: 'more' })
  const after = withFirstPage(before, page([3, 2], 'x'))
  expect(after.tasks).toEqual([task(2), task(1)])
  expect(ids(after.fresh)).toEqual(['task-3'])
  expect(after.cursor).toBe('more')
  expect(ids(withFresh(after).tasks)).toEqual(['task-3', 'task-2', 'task-1'])
  expect(withFresh(after).fresh).toEqual([])
})

test('more new tasks than a page holds start the list anew, without a gap', () => {
  const before = listed(page([2, 1], 'old'))
  const after = withFresh(withFirstPage(before, page([9, 8], 'after 8')))
  expect(ids(after.tasks)).toEqual(['task-9', 'task-8'])
  expect(after.cursor).toBe('after 8')
})

test('a task that comes to fit the filter takes its place by age', () => {
  const after = withFresh(withFirstPage(listed(page([5, 1])), page([5, 3, 1])))
  expect(ids(after.tasks)).toEqual(['task-5', 'task-3', 'task-1'])
})

test('pages join without doubles', () => {
  const after = withNextPage(listed(page([3, 2], 'a')), page([2, 1], 'b'))
  expect(ids(after.tasks)).toEqual(['task-3', 'task-2', 'task-1'])
  expect(after.cursor).toBe('b')
})
