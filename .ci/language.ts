/** Part of the lint: finds what a script can find of language that is hard to read, and exits with 1 for it. */
import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'

const COLUMNS_MAX = 100
const PATHS = ['src', 'web/src', 'docs', 'README.md', 'SECURITY.md', 'test/README.md']

/** Phrases with plainer ones beside them. */
const PHRASES: readonly (readonly [RegExp, string])[] = [
  [/\bwhoever\b/i, 'name who it is: "a caller that …"'],
  [/\b(is|are|be|was|were|been) told\b/i, '"is reported", "learns", "is notified"'],
  [/\b(may|can|could|cannot|not|to) be had\b/i, '"is (un)available", "can be made"'],
  [/\blets? go of\b/i, '"releases", "closes"'],
  [/\b(takes|takes its) leave\b/i, '"ends", "removes"'],
]
/** A function's comment begins with a verb, a value's with a noun. */
const PREPOSITION = /^\s*\/\*\* ?(Of|For|By|With|To|In|On|At|From|Like|As|Beside|Without|Until) /

/** Returns what is wrong with a line of prose. `isComment`: of a program, else of a document. */
function findings(line: string, isComment: boolean): string[] {
  const isProse = isComment ? /^\s*(\/\/|\/\*|\*|#)/.test(line) : !/^\s*(\||#|\[|```)/.test(line)
  return [
    ...PHRASES.filter(([phrase]) => phrase.test(line)).map(([, better]) => `say ${better}`),
    ...(PREPOSITION.test(line) ? ['begin with a verb or a noun'] : []),
    ...(isProse && line.length > COLUMNS_MAX && !/https?:\S{60}/.test(line)
      ? [`wrap at ${COLUMNS_MAX} columns`]
      : []),
  ]
}

const files = execFileSync('git', ['ls-files', '--', ...PATHS], { encoding: 'utf8' })
  .split('\n')
  .filter((path) => /\.(ts|tsx|sh|md|css)$/.test(path))
let count = 0
for (const path of files) {
  let isInFence = false
  for (const [index, line] of readFileSync(path, 'utf8').split('\n').entries()) {
    const isDocument = path.endsWith('.md')
    if (isDocument && line.startsWith('```')) isInFence = !isInFence
    if (isInFence) continue
    for (const finding of findings(line, !isDocument)) {
      count += 1
      console.error(`${path}:${index + 1}: ${finding}\n    ${line.trim()}`)
    }
  }
}
if (count > 0) console.error(`${count} findings`)
process.exitCode = count > 0 ? 1 : 0
