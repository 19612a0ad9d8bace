import { useCallback, useEffect, useRef, useState } from 'preact/hooks'
import { ApiError, messageOf } from './api.ts'

interface Live<T> {
  data: T | undefined
  /** Why the last look failed; what was seen before is still there. */
  problem: string | undefined
  reload: () => void
}

/**
 * What `load` gives, looked at again every `everyMs` while the tab is visible, until `isDone`. A new `key` starts over.
 */
export function useLive<T>(
  key: string,
  load: (signal: AbortSignal) => Promise<T>,
  options: { everyMs: number; isDone?: (data: T) => boolean },
): Live<T> {
  const [seen, setSeen] = useState<{ key: string; data?: T; problem?: string }>({ key })
  const [round, setRound] = useState(0)
  const reload = useCallback(() => setRound((count) => count + 1), [])
  // Made anew by each rendering: a look is to see what the newest of them sees.
  const latest = useRef({ load, ...options })
  latest.current = { load, ...options }

  useEffect(() => {
    const gone = new AbortController()
    let timer: number | undefined
    let isLoading = false
    const look = async () => {
      clearTimeout(timer)
      if (isLoading || document.hidden) return
      isLoading = true
      let isDone = false
      try {
        const data = await latest.current.load(gone.signal)
        if (gone.signal.aborted) return
        isDone = latest.current.isDone?.(data) ?? false
        setSeen({ key, data })
      } catch (err) {
        if (gone.signal.aborted) return
        // What is not there will not come by itself.
        isDone = err instanceof ApiError && err.status === 404
        const problem = `${messageOf(err)}.${isDone ? '' : ' Trying again.'}`
        setSeen((before) => ({ ...(before.key === key ? before : { key }), problem }))
      }
      isLoading = false
      if (!isDone) timer = window.setTimeout(look, latest.current.everyMs)
    }
    void look()
    document.addEventListener('visibilitychange', look, { signal: gone.signal })
    return () => {
      clearTimeout(timer)
      gone.abort()
    }
  }, [key, round])

  const current = seen.key === key ? seen : undefined
  return { data: current?.data, problem: current?.problem, reload }
}

/** The time, told anew every second while `isTicking`. */
export function useNow(isTicking: boolean): number {
  const [now, setNow] = useState(Date.now)
  useEffect(() => {
    if (!isTicking) return
    const tick = () => setNow(Date.now())
    tick()
    const timer = setInterval(tick, 1000)
    return () => clearInterval(timer)
  }, [isTicking])
  return now
}

/** Something a person asked for: runs it, and tells how it went. */
export function useAction() {
  const [state, setState] = useState<{ isBusy: boolean; told: string; isError: boolean }>({
    isBusy: false,
    told: '',
    isError: false,
  })
  const run = async (work: () => Promise<{ message: string }>): Promise<boolean> => {
    setState({ isBusy: true, told: '', isError: false })
    try {
      const { message } = await work()
      setState({ isBusy: false, told: message, isError: false })
      return true
    } catch (err) {
      setState({ isBusy: false, told: messageOf(err), isError: true })
      return false
    }
  }
  return { ...state, run }
}
