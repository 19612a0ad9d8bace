import { useEffect, useState } from 'preact/hooks'

export type Route =
  | { page: 'overview' }
  | { page: 'tasks' }
  | { page: 'task'; id: string }
  | { page: 'workers' }
  | { page: 'run'; like: string | undefined }

/** Returns the page of a hash, or the overview if the hash names none. */
export function parseRoute(hash: string): Route {
  const [page, ...rest] = hash.replace(/^#\/?/, '').split('/')
  const id = decoded(rest.join('/'))
  if (page === 'tasks') return id === '' ? { page: 'tasks' } : { page: 'task', id }
  if (page === 'workers') return { page: 'workers' }
  if (page === 'run') return { page: 'run', like: id === '' ? undefined : id }
  return { page: 'overview' }
}

export function taskHref(id: string): string {
  return `#/tasks/${encodeURIComponent(id)}`
}

export function runAgainHref(id: string): string {
  return `#/run/${encodeURIComponent(id)}`
}

export function go(href: string): void {
  location.hash = href
}

export function useRoute(): Route {
  const [hash, setHash] = useState(location.hash)
  useEffect(() => {
    const follow = () => setHash(location.hash)
    addEventListener('hashchange', follow)
    return () => removeEventListener('hashchange', follow)
  }, [])
  return parseRoute(hash)
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}
