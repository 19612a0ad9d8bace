import { test } from 'vitest'
import { type Program, whyNot } from './programs.ts'

/**
 * Returns vitest's `test` for tests that need these programs. Where one is missing it skips them, beside a skipped
 * test whose name says what is missing; in continuous integration it throws.
 */
export function needs(...programs: Program[]) {
  const reason = whyNot(...programs)
  if (reason === undefined) return test
  test.skip(reason, () => {})
  return test.skip
}
