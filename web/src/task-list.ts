import type { TaskList, TaskSummary } from './api.ts'

/**
 * Tasks as they are shown: what is loaded stays where it is, and only grows at its ends. New tasks wait in `fresh`
 * until the reader takes them in.
 */
export interface Listed {
  tasks: readonly TaskSummary[]
  fresh: readonly TaskSummary[]
  /** Of the page after what is loaded. */
  cursor: string | null
  /** There are more new tasks than the page that told of them holds, so that they join to nothing. */
  gapCursor: string | null
}

export function listed(page: TaskList): Listed {
  return { tasks: page.tasks, fresh: [], cursor: page.next_cursor, gapCursor: null }
}

/** Takes in a look at the first page: news of what is loaded goes in place, new tasks wait. */
export function withFirstPage(before: Listed, page: TaskList): Listed {
  const known = new Set(before.tasks.map((task) => task.task_id))
  const fresh = page.tasks.filter((task) => !known.has(task.task_id))
  const isGap = fresh.length === page.tasks.length && page.next_cursor !== null
  return {
    ...withNews(before, page.tasks),
    fresh,
    gapCursor: isGap ? page.next_cursor : null,
  }
}

/** Puts what is known anew in the places of the old. */
export function withNews(before: Listed, news: readonly TaskSummary[]): Listed {
  const byId = new Map(news.map((task) => [task.task_id, task]))
  const tasks = before.tasks.map((task) => byId.get(task.task_id) ?? task)
  return { ...before, tasks }
}

export function withFresh(before: Listed): Listed {
  if (before.fresh.length === 0) return before
  if (before.gapCursor !== null) {
    return { tasks: before.fresh, fresh: [], cursor: before.gapCursor, gapCursor: null }
  }
  // One that came to fit the filter may be older than others that are shown.
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
