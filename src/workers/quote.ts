/**
 * Returns `value` as one word of a POSIX shell, in single quotes, between which nothing is special
 * (XCU 2.2.2). `value` must not contain NUL.
 */
export function quote(value: string): string {
  return `'${value.replaceAll("'", `'\\''`)}'`
}
