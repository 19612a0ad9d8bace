import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from 'preact/hooks'
import { api, logUrl } from './api.ts'
import { LogRows, type Row, rowsWith, type Span, spansOf } from './log-rows.ts'
import { counted } from './text.ts'
import { useWindow } from './windowed.ts'

const ROW_HEIGHT = 19
/** Maximum characters added at a time: more would block the page. */
const CHUNK_CHARACTERS = 262_144

/** Shows a task's log as it is written, until the task has ended. */
export function Log({ taskId, onEnd }: { taskId: string; onEnd: () => void }) {
  const { log, version, state } = useLog(taskId, onEnd)
  const scroller = useRef<HTMLDivElement>(null)
  const [isFollowing, setFollowing] = useState(true)
  const [sought, setSought] = useState('')
  const [chosen, setChosen] = useState(0)
  const rows = log.rows
  const { first, end } = useWindow(scroller, { count: rows.length, height: ROW_HEIGHT })
  // A new `version` means that the rows have changed.
  const found = useMemo(() => rowsWith(rows, sought), [version, sought])

  // Each version may have added rows at the end.
  useLayoutEffect(() => {
    const element = scroller.current
    if (element && isFollowing) element.scrollTop = element.scrollHeight
  }, [version, isFollowing])
  useUpwards(scroller, () => setFollowing(false))

  const jump = (to: number) => {
    if (found.length === 0) return
    const index = (to + found.length) % found.length
    setChosen(index)
    setFollowing(false)
    const element = scroller.current
    const top = (found[index] ?? 0) * ROW_HEIGHT
    element?.scrollTo({ top: Math.max(0, top - element.clientHeight / 2) })
  }
  const digits = String(rows.findLast((row) => row.number !== undefined)?.number ?? 1).length

  return (
    <section class="log" aria-labelledby="log-heading">
      <header>
        <h2 id="log-heading">Log</h2>
        <p role="status" class="quiet">
          {state}
        </p>
        <search>
          <label class="inline">
            <span class="hidden">Search the log</span>
            <input
              type="search"
              placeholder="Search the log"
              value={sought}
              onInput={(event) => {
                setSought(event.currentTarget.value)
                setChosen(0)
              }}
              onKeyDown={(event) => {
                if (event.key === 'Enter') jump(event.shiftKey ? chosen - 1 : chosen + 1)
              }}
            />
          </label>
          <span role="status" class="matches">
            {sought !== '' &&
              (found.length === 0
                ? 'No matches'
                : `${chosen + 1} of ${counted(found.length, 'line')}`)}
          </span>
          <button type="button" aria-label="Previous match" onClick={() => jump(chosen - 1)}>
            ↑
          </button>
          <button type="button" aria-label="Next match" onClick={() => jump(chosen + 1)}>
            ↓
          </button>
        </search>
        <label class="inline">
          <input
            type="checkbox"
            checked={isFollowing}
            onChange={(event) => setFollowing(event.currentTarget.checked)}
          />
          Follow
        </label>
        <a class="button" href={logUrl(taskId, { follow: false })} download={`${taskId}.log`}>
          Download
        </a>
      </header>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls has to be reached by keyboard */}
      <div class="lines" ref={scroller} role="log" aria-label="Log" aria-live="off" tabIndex={0}>
        <div class="rows" style={{ height: `${rows.length * ROW_HEIGHT}px` }}>
          <div class="seen" style={{ transform: `translateY(${first * ROW_HEIGHT}px)` }}>
            {rows.slice(first, end).map((row, index) => (
              <Line
                key={first + index + log.dropped}
                row={row}
                digits={digits}
                sought={sought}
                isChosen={found[chosen] === first + index && sought !== ''}
              />
            ))}
          </div>
        </div>
      </div>
    </section>
  )
}

interface LineProps {
  row: Row
  digits: number
  sought: string
  isChosen: boolean
}

function Line({ row, digits, sought, isChosen }: LineProps) {
  const number = row.number === undefined ? '' : String(row.number)
  return (
    <div class={isChosen ? 'line chosen' : 'line'}>
      <span class="number" aria-hidden="true">
        {number.padStart(digits)}
      </span>
      {marked(spansOf(row), row.text, sought).map((span, index) => (
        <span
          key={index}
          class={span.className}
          style={{ color: span.color ?? '', backgroundColor: span.background ?? '' }}
        >
          {span.text}
        </span>
      ))}
    </div>
  )
}

/** Splits spans at the matches of the search, and marks these. */
function marked(spans: Span[], text: string, sought: string): Span[] {
  if (sought === '') return spans
  const lower = text.toLowerCase()
  const wanted = sought.toLowerCase()
  const hits: [start: number, end: number][] = []
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, at + wanted.length)) {
    hits.push([at, at + wanted.length])
  }
  const isHit = (at: number) => hits.some(([start, end]) => start <= at && at < end)
  const borders = hits.flat()
  let at = 0
  return spans.flatMap((span) => {
    const end = at + span.text.length
    const cuts = [at, ...borders.filter((border) => at < border && border < end), end]
    const start = at
    at = end
    return cuts.slice(0, -1).map((from, index) => ({
      ...span,
      text: span.text.slice(from - start, (cuts[index + 1] ?? end) - start),
      className: isHit(from) ? `${span.className} match` : span.className,
    }))
  })
}

/** Calls `onUpwards` when the user scrolls up. Added rows never scroll up. */
function useUpwards(scroller: { current: HTMLElement | null }, onUpwards: () => void): void {
  useEffect(() => {
    const element = scroller.current
    if (!element) return
    let before = element.scrollTop
    const compare = () => {
      const isAtEnd = element.scrollTop + element.clientHeight > element.scrollHeight - ROW_HEIGHT
      if (element.scrollTop < before && !isAtEnd) onUpwards()
      before = element.scrollTop
    }
    element.addEventListener('scroll', compare, { passive: true })
    return () => element.removeEventListener('scroll', compare)
  }, [scroller])
}

/** Streams a log into `log`, a mutable object; `version` rises with every change of it. */
function useLog(taskId: string, onEnd: () => void) {
  const [version, changed] = useReducer((count: number) => count + 1, 0)
  const [state, setState] = useState('')
  const log = useRef(new LogRows())

  useEffect(() => {
    log.current = new LogRows()
    setState('connecting')
    const waiting: string[] = []
    let isEnded = false
    let timer: number | undefined
    const addChunk = () => {
      timer = undefined
      const [text = '', ...rest] = waiting.splice(0)
      log.current.add(text.slice(0, CHUNK_CHARACTERS))
      if (text.length > CHUNK_CHARACTERS) rest.unshift(text.slice(CHUNK_CHARACTERS))
      waiting.push(...rest)
      changed(undefined)
      if (waiting.length > 0) timer = window.setTimeout(addChunk)
      else setState(isEnded ? 'complete' : 'live')
    }
    const take = (text: string) => {
      waiting.push(text)
      timer ??= window.setTimeout(addChunk)
    }
    const events = new EventSource(logUrl(taskId, { follow: true }))
    events.onopen = () => setState('live')
    events.onmessage = (event: MessageEvent<string>) => take(event.data)
    events.addEventListener('end', () => {
      events.close()
      isEnded = true
      if (waiting.length === 0) setState('complete')
      onEnd()
    })
    events.onerror = () => {
      // The browser reconnects by itself, unless it got an error response.
      if (events.readyState === EventSource.CONNECTING) return setState('reconnecting')
      setState('not available')
      // If the session has expired, this request shows the sign-in page.
      void api.task(taskId).catch(() => {})
    }
    return () => {
      events.close()
      clearTimeout(timer)
    }
  }, [taskId])

  return { log: log.current, version, state }
}
