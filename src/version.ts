import { readFileSync } from 'node:fs'

/** Of the package, whether it runs from src/ or from dist/. */
export const VERSION = String(
  JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version,
)
