import type { TaskList, TaskSummary } from './api.ts'

/**
 * The tasks shown. Loaded tasks keep their places; the list grows only at its ends. New tasks wait
 * in `fresh` until the user shows them.
 */
export interface Listed {
  tasks: readonly TaskSummary[]
  fresh: readonly TaskSummary[]
  /** Cursor of the next page. */
  cursor: string | null
  /** Cursor after `fresh`, if there are more new tasks than fit into the first page. */
  gapCursor: string | null
}

export function listed(page: TaskList): Listed {
  return { tasks: page.tasks, fresh: [], cursor: page.next_cursor, gapCursor: null }
}

/** Merges the first page: updates loaded tasks in place, and puts new ones into `fresh`. */
export function withFirstPage(before: Listed, page: TaskList): Listed {
  const known = new Set(before.tasks.map((task) => task.task_id))
  const fresh = page.tasks.filter((task) => !known.has(task.task_id))
  const isGap = fresh.length === page.tasks.length && page.next_cursor !== null
  return {
    ...withUpdates(before, page.tasks),
    fresh,
    gapCursor: isGap ? page.next_cursor : null,
  }
}

/** Replaces tasks by newer versions of them. */
export function withUpdates(before: Listed, updates: readonly TaskSummary[]): Listed {
  const byId = new Map(updates.map((task) => [task.task_id, task]))
  const tasks = before.tasks.map((task) => byId.get(task.task_id) ?? task)
  return { ...before, tasks }
}

export function withFresh(before: Listed): Listed {
  if (before.fresh.length === 0) return before
  if (before.gapCursor !== null) {
    return { tasks: before.fresh, fresh: [], cursor: before.gapCursor, gapCursor: null }
  }
  // A task that only now matches the filter may be older than some that are shown.
  const tasks = [...before.fresh, ...before.tasks].sort((a, b) =>
    a.created_at === b.created_at ? 0 : a.created_at < b.created_at ? 1 : -1,
  )
  return { ...before, tasks, fresh: [] }
}

export function withNextPage(before: Listed, page: TaskList): Listed {
  const known = new Set(before.tasks.map((task) => task.task_id))
  const more = page.tasks.filter((task) => !known.has(task.task_id))
  return { ...before, tasks: [...before.tasks, ...more], cursor: page.next_cursor }
}
