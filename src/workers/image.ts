export interface ImageNames {
  /** For workers that name none. */
  default: string
  /** Put before short names; empty, or such as `example.com/team/`. */
  prefix: string
}

/** The image as engines know it: a short name gets the prefix, and one without tag or digest gets `latest`. */
export function imageFor(name: string | undefined, names: ImageNames): string {
  const given = name ?? names.default
  const isShort = !given.includes('/')
  const whole = isShort && name !== undefined ? names.prefix + given : given
  const last = whole.slice(whole.lastIndexOf('/') + 1)
  return last.includes(':') || last.includes('@') ? whole : `${whole}:latest`
}
