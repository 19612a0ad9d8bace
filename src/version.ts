import { readFileSync } from 'node:fs'

/** Version of the package, read from package.json beside src/ or dist/. */
export const VERSION = String(
  JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version,
)
