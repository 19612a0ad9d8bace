/** Makes a table of figures, one per round. */

export interface Row {
  what: string
  unit: string
  /** One figure per round. */
  measured: number[]
  /** Without figures, the name says why they are missing. */
  yardstick: { name: string; figures: number[] }
  /** `of`: whether the limit is one of the ratio or of the value. */
  aim?: { of: 'ratio' | 'value'; limit: number; better: 'more' | 'less' }
}

/** Returns a quantile of an unsorted list; `q` in 0..1. */
export function quantile(figures: readonly number[], q: number): number {
  const sorted = figures.toSorted((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN
}

export function median(figures: readonly number[]): number {
  const sorted = figures.toSorted((a, b) => a - b)
  const middle = (sorted.length - 1) / 2
  return ((sorted[Math.floor(middle)] ?? 0) + (sorted[Math.ceil(middle)] ?? 0)) / 2
}

/** Returns a table in Markdown, aligned for terminals. */
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

/** Returns the ratio of each round: the other load of the machine changes between rounds. */
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

/** Returns the median, and the smallest and largest figure. */
function spread(figures: readonly number[]): string {
  if (figures.length === 1) return short(figures[0] ?? Number.NaN)
  return `${short(median(figures))} (${short(Math.min(...figures))} to ${short(Math.max(...figures))})`
}

function short(figure: number): string {
  return figure >= 100 ? figure.toFixed(0) : figure.toPrecision(figure >= 10 ? 3 : 2)
}
