import type { RefObject } from 'preact'
import { useEffect, useState } from 'preact/hooks'

/** Rows rendered above and below the visible ones, so that scrolling does not show gaps. */
const SPARE_ROWS = 12

/** Returns which of many rows of one height to render: from `first` to before `end`. */
export function useWindow(
  scroller: RefObject<HTMLElement | null>,
  rows: { count: number; height: number },
): { first: number; end: number } {
  const { count, height } = rows
  const [{ top, seen }, setPlace] = useState({ top: 0, seen: 40 })
  useEffect(() => {
    const element = scroller.current
    if (!element) return
    const update = () => {
      const place = {
        // Rounded, so that not every pixel of scrolling renders.
        top: Math.floor(element.scrollTop / height / 4) * 4,
        seen: Math.ceil(element.clientHeight / height),
      }
      setPlace((before) =>
        before.top === place.top && before.seen === place.seen ? before : place,
      )
    }
    update()
    const resized = new ResizeObserver(update)
    resized.observe(element)
    element.addEventListener('scroll', update, { passive: true })
    return () => {
      resized.disconnect()
      element.removeEventListener('scroll', update)
    }
  }, [scroller, height])
  const first = Math.max(0, Math.min(top, count - seen) - SPARE_ROWS)
  return { first, end: Math.min(count, Math.max(top, 0) + seen + 4 + SPARE_ROWS) }
}

export function useMedia(query: string): boolean {
  const [matches, setMatches] = useState(() => matchMedia(query).matches)
  useEffect(() => {
    const media = matchMedia(query)
    const follow = () => setMatches(media.matches)
    media.addEventListener('change', follow)
    return () => media.removeEventListener('change', follow)
  }, [query])
  return matches
}
