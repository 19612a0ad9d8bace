/**
 * A word of a POSIX shell that means exactly `value`, byte for byte (XCU 2.2.2: nothing is special between
 * single quotes). `value` must not contain NUL.
 */
export function quote(value: string): string {
  return `'${value.replaceAll("'", `'\\''`)}'`
}
