/** Figures, one per round, and the table they end in. Pure. */

export interface Row {
  what: string
  unit: string
  /** One figure per round. */
  measured: number[]
  /** Without figures: left out, and the name says why. */
  yardstick: { name: string; figures: number[] }
  /** `ratio` and `value` say which of the two the limit is for. */
  aim?: { of: 'ratio' | 'value'; limit: number; better: 'more' | 'less' }
}

/** `q` in 0..1; of an unsorted list. */
export function quantile(figures: readonly number[], q: number): number {
  const sorted = figures.toSorted((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN
}

export function median(figures: readonly number[]): number {
  const sorted = figures.toSorted((a, b) => a - b)
  const middle = (sorted.length - 1) / 2
  return ((sorted[Math.floor(middle)] ?? 0) + (sorted[Math.ceil(middle)] ?? 0)) / 2
}

/** Markdown, aligned, so that it reads in a terminal as well. */
export function table(rows: readonly Row[]): string {
  const cells = [
    ['what', 'measured', 'yardstick of the same run', 'ratio', 'aim'],
    ...rows.map((row) => [
      row.what,
      `${spread(row.measured)} ${row.unit}`,
      row.yardstick.figures.length === 0
        ? row.yardstick.name
        : `${spread(row.yardstick.figures)} ${row.unit}: ${row.yardstick.name}`,
      row.yardstick.figures.length === 0 ? '' : spread(ratios(row)),
      aimText(row),
    ]),
  ]
  const widths = (cells[0] ?? []).map((_, column) =>
    Math.max(...cells.map((line) => line[column]?.length ?? 0)),
  )
  const lines = cells.map(
    (line) => `| ${line.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join(' | ')} |`,
  )
  lines.splice(1, 0, `| ${widths.map((width) => '-'.repeat(width)).join(' | ')} |`)
  return lines.join('\n')
}

/** Round by round, since what else the machine does changes between rounds. */
function ratios(row: Row): number[] {
  return row.measured.map((figure, round) => figure / (row.yardstick.figures[round] ?? Number.NaN))
}

function aimText(row: Row): string {
  if (!row.aim) return ''
  const { of, limit, better } = row.aim
  if (of === 'ratio' && row.yardstick.figures.length === 0) return 'not measured'
  const figure = median(of === 'ratio' ? ratios(row) : row.measured)
  const met = better === 'more' ? figure >= limit : figure < limit
  const unit = of === 'ratio' ? '' : ` ${row.unit}`
  return `${better === 'more' ? '>=' : '<'} ${Number(limit.toPrecision(2))}${unit}: ${met ? 'met' : 'missed'}`
}

/** Median, and the smallest and largest round. */
function spread(figures: readonly number[]): string {
  if (figures.length === 1) return short(figures[0] ?? Number.NaN)
  return `${short(median(figures))} (${short(Math.min(...figures))} to ${short(Math.max(...figures))})`
}

function short(figure: number): string {
  return figure >= 100 ? figure.toFixed(0) : figure.toPrecision(figure >= 10 ? 3 : 2)
}
