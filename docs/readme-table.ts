/** Writes README's table of environment variables; a test fails while it is stale. */
import { readFile, writeFile } from 'node:fs/promises'
import { VARIABLES } from '../src/config.ts'

const README = new URL('../README.md', import.meta.url)
const TABLE = /^\| variable .*\n(?:\|.*\n)+/m

/** Returns the text with the table renewed. */
export function withTable(readme: string): string {
  if (!TABLE.test(readme)) throw new Error('README has no table of variables')
  const rows = VARIABLES.map(({ name, unset, description }) => [`\`${name}\``, unset, description])
  const cells = [['variable', 'default', 'meaning'], ...rows]
  const widths = [0, 1, 2].map((column) =>
    Math.max(...cells.map((row) => row[column]?.length ?? 0)),
  )
  const line = (row: string[]) =>
    `| ${row.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join(' | ')} |\n`
  const [head = '', ...body] = cells.map(line)
  const rule = line(widths.map((width) => '-'.repeat(width)))
  return readme.replace(TABLE, () => [head, rule, ...body].join(''))
}

if (import.meta.main) await writeFile(README, withTable(await readFile(README, 'utf8')))
