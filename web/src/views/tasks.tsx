import { useEffect, useMemo, useRef, useState } from 'preact/hooks'
import {
  ApiError,
  api,
  type Filter,
  hasEnded,
  isSettled,
  messageOf,
  type TaskSummary,
} from '../api.ts'
import { useLive, useNow } from '../live.ts'
import { Heading, Problem } from '../parts.tsx'
import { go, taskHref } from '../route.ts'
import { TASK_FILES } from '../task-files.tsx'
import {
  type Listed,
  listed,
  withFirstPage,
  withFresh,
  withNextPage,
  withUpdates,
} from '../task-list.ts'
import { TaskHead, TaskRow } from '../task-row.tsx'
import { counted, words } from '../text.ts'
import { useMedia, useWindow } from '../windowed.ts'

const STATUSES = ['queued', 'provisioning', 'running', 'succeeded', 'failed', 'cancelled']
const CALLBACKS = ['pending', 'delivered', 'given_up', 'none']
const FIRST_PAGE = 100
const NEXT_PAGE = 500
const POLL_MS = 2000
/** Rows below the visible ones at which the next page is fetched. */
const ROWS_AHEAD = 100
const ROW_HEIGHT = 38
const ROW_HEIGHT_NARROW = 62

export function TasksView() {
  const [filter, setFilter] = useState<Filter>({})
  const [typed, setTyped] = useState('')
  return (
    <>
      <Heading title="Tasks">Tasks</Heading>
      <Filters filter={filter} setFilter={setFilter} typed={typed} setTyped={setTyped} />
      <List key={JSON.stringify(filter)} filter={filter} typed={typed.trim()} />
    </>
  )
}

function Filters(props: {
  filter: Filter
  setFilter: (filter: Filter) => void
  typed: string
  setTyped: (typed: string) => void
}) {
  const { filter, setFilter, typed, setTyped } = props
  const [message, setMessage] = useState('')
  const open = async (event: Event) => {
    event.preventDefault()
    const id = typed.trim()
    if (id === '') return
    try {
      await api.task(id)
      go(taskHref(id))
    } catch (err) {
      const isUnknown = err instanceof ApiError && err.status === 404
      setMessage(isUnknown ? 'No task has exactly this ID.' : messageOf(err))
    }
  }
  const choice = (name: 'status' | 'callback_status', label: string, options: string[]) => (
    <label>
      {label}
      <select
        value={filter[name] ?? ''}
        onChange={(event) => setFilter({ ...filter, [name]: event.currentTarget.value })}
      >
        <option value="">any</option>
        {options.map((option) => (
          <option value={option} key={option}>
            {words(option)}
          </option>
        ))}
      </select>
    </label>
  )
  return (
    <form class="filters" role="search" onSubmit={open}>
      <label class="wide">
        Search
        <input
          type="search"
          value={typed}
          placeholder="Task ID; Enter opens it"
          aria-describedby="search-message"
          onInput={(event) => {
            setTyped(event.currentTarget.value)
            setMessage('')
          }}
        />
      </label>
      <button type="submit">Open</button>
      {choice('status', 'Status', STATUSES)}
      {choice('callback_status', 'Callback', CALLBACKS)}
      <label>
        Task file
        <input
          value={filter.task_file_name ?? ''}
          placeholder="any"
          list={TASK_FILES}
          onChange={(event) =>
            setFilter({ ...filter, task_file_name: event.currentTarget.value.trim() })
          }
        />
      </label>
      <p role="status" id="search-message" class="message">
        {message}
      </p>
    </form>
  )
}

function List({ filter, typed }: { filter: Filter; typed: string }) {
  const scroller = useRef<HTMLDivElement>(null)
  const isNarrow = useMedia('(max-width: 720px)')
  const height = isNarrow ? ROW_HEIGHT_NARROW : ROW_HEIGHT
  const [list, setList] = useState<Listed>()
  const [isLoading, setLoading] = useState(false)
  const tasks = useMemo(() => narrowed(list?.tasks ?? [], typed), [list, typed])
  const { first, end } = useWindow(scroller, { count: tasks.length, height })
  const seen = tasks.slice(first, end)
  const now = useNow(seen.some((task) => !hasEnded(task)))

  const { problem } = useLive(
    'list',
    async (signal) => {
      const page = await api.tasks({ ...filter, limit: FIRST_PAGE }, signal)
      const onPage = new Set(page.tasks.map((task) => task.task_id))
      const others = seen.filter((task) => !isSettled(task) && !onPage.has(task.task_id))
      const updates = await Promise.all(
        others.map((task) => api.task(task.task_id, signal).catch(() => task)),
      )
      // New tasks are shown immediately only at the top: otherwise rows would move under the user.
      const isAtTop = (scroller.current?.scrollTop ?? 0) < height && !hasFocus(scroller.current)
      setList((before) => {
        if (!before) return listed(page)
        const after = withUpdates(withFirstPage(before, page), updates)
        return isAtTop ? withFresh(after) : after
      })
    },
    { everyMs: POLL_MS },
  )

  const loadMore = async () => {
    if (isLoading || !list?.cursor) return
    setLoading(true)
    try {
      const page = await api.tasks({ ...filter, limit: NEXT_PAGE, cursor: list.cursor })
      setList((before) => before && withNextPage(before, page))
    } catch {
      // The poll of the first page reports the problem. This request is retried, too.
      await new Promise((resolve) => setTimeout(resolve, POLL_MS))
    }
    setLoading(false)
  }
  const isNearEnd = typed === '' && end > tasks.length - ROWS_AHEAD
  useEffect(() => {
    if (isNearEnd) void loadMore()
  }, [isNearEnd, list?.cursor, isLoading])

  const showFresh = () => {
    setList((before) => before && withFresh(before))
    scroller.current?.scrollTo({ top: 0 })
  }

  return (
    <>
      <Problem text={problem} />
      <div class="facts">
        <p role="status">
          {list && !list.cursor && typed === '' && counted(tasks.length, 'task')}
          {list?.cursor &&
            typed === '' &&
            `${counted(tasks.length, 'task')} loaded, more as you scroll`}
          {list &&
            typed !== '' &&
            `${tasks.length} of ${counted(list.tasks.length, 'loaded task')}`}
        </p>
        {list?.cursor && typed !== '' && (
          <button type="button" onClick={loadMore} disabled={isLoading}>
            Load more
          </button>
        )}
        {list && list.fresh.length > 0 && (
          <button type="button" class="fresh" onClick={showFresh}>
            ↑ {counted(list.fresh.length, 'new task')}
          </button>
        )}
      </div>
      <div class="scroller" ref={scroller} role="table" aria-label="Tasks" aria-rowcount={-1}>
        <div role="rowgroup" class="sticky">
          <TaskHead />
        </div>
        <div role="rowgroup" class="rows" style={{ height: `${tasks.length * height}px` }}>
          <div class="seen" style={{ transform: `translateY(${first * height}px)` }}>
            {seen.map((task, index) => (
              <TaskRow key={task.task_id} task={task} now={now} index={first + index} />
            ))}
          </div>
        </div>
        {list && tasks.length === 0 && <Nothing isAll={list.tasks.length === 0} filter={filter} />}
      </div>
    </>
  )
}

function Nothing({ isAll, filter }: { isAll: boolean; filter: Filter }) {
  const isFiltered = Object.values(filter).some((value) => value !== '')
  if (!isAll || isFiltered) return <p class="nothing">No tasks match.</p>
  return (
    <p class="nothing">
      No tasks yet. <a href="#/run">Run one</a>
    </p>
  )
}

function narrowed(tasks: readonly TaskSummary[], typed: string): readonly TaskSummary[] {
  const wanted = typed.toLowerCase()
  if (wanted === '') return tasks
  return tasks.filter(({ task_id, task_file_name }) =>
    `${task_id}\n${task_file_name}`.toLowerCase().includes(wanted),
  )
}

/** Returns whether a keyboard user is inside the element. */
function hasFocus(element: HTMLElement | null): boolean {
  return element?.matches(':focus-within') ?? false
}
