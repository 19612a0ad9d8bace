export interface ImageNames {
  /** Image of workers whose request names none. */
  default: string
  /** Prefix of short names; empty, or for example `example.com/team/`. */
  prefix: string
}

/** Returns the full name: with the prefix if it is short, and `latest` without tag or digest. */
export function imageFor(name: string | undefined, names: ImageNames): string {
  const given = name ?? names.default
  const isShort = !given.includes('/')
  const whole = isShort && name !== undefined ? names.prefix + given : given
  const last = whole.slice(whole.lastIndexOf('/') + 1)
  return last.includes(':') || last.includes('@') ? whole : `${whole}:latest`
}
