import { useCallback, useEffect, useRef, useState } from 'preact/hooks'
import { ApiError, messageOf } from './api.ts'

interface Live<T> {
  data: T | undefined
  /** Why the last request failed; `data` is still that of the request before. */
  problem: string | undefined
  reload: () => void
}

/** Loads data every `everyMs` while the tab is visible, until `isDone`. A new `key` starts over. */
export function useLive<T>(
  key: string,
  load: (signal: AbortSignal) => Promise<T>,
  options: { everyMs: number; isDone?: (data: T) => boolean },
): Live<T> {
  const [loaded, setLoaded] = useState<{ key: string; data?: T; problem?: string }>({ key })
  const [round, setRound] = useState(0)
  const reload = useCallback(() => setRound((count) => count + 1), [])
  // Each request uses the functions of the latest rendering.
  const latest = useRef({ load, ...options })
  latest.current = { load, ...options }

  useEffect(() => {
    const gone = new AbortController()
    let timer: number | undefined
    let isLoading = false
    const poll = async () => {
      clearTimeout(timer)
      if (isLoading || document.hidden) return
      isLoading = true
      let isDone = false
      try {
        const data = await latest.current.load(gone.signal)
        if (gone.signal.aborted) return
        isDone = latest.current.isDone?.(data) ?? false
        setLoaded({ key, data })
      } catch (err) {
        if (gone.signal.aborted) return
        // A missing task or worker will not appear later.
        isDone = err instanceof ApiError && err.status === 404
        const problem = `${messageOf(err)}.${isDone ? '' : ' Retrying.'}`
        setLoaded((before) => ({ ...(before.key === key ? before : { key }), problem }))
      }
      isLoading = false
      if (!isDone) timer = window.setTimeout(poll, latest.current.everyMs)
    }
    void poll()
    document.addEventListener('visibilitychange', poll, { signal: gone.signal })
    return () => {
      clearTimeout(timer)
      gone.abort()
    }
  }, [key, round])

  const current = loaded.key === key ? loaded : undefined
  return { data: current?.data, problem: current?.problem, reload }
}

/** Returns the time, updated every second while `isTicking`. */
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

/** Runs an action that a person requested, and keeps its result as a message. */
export function useAction() {
  const [state, setState] = useState<{ isBusy: boolean; message: string; isError: boolean }>({
    isBusy: false,
    message: '',
    isError: false,
  })
  const run = async (work: () => Promise<{ message: string }>): Promise<boolean> => {
    setState({ isBusy: true, message: '', isError: false })
    try {
      const { message } = await work()
      setState({ isBusy: false, message, isError: false })
      return true
    } catch (err) {
      setState({ isBusy: false, message: messageOf(err), isError: true })
      return false
    }
  }
  return { ...state, run }
}
