import type { Row } from './report.ts'

export interface Context {
  quick: boolean
  /** For the service's process: `--cpu-prof` and the like. */
  nodeOptions: readonly string[]
  /** Tells whoever waits. */
  note: (text: string) => void
  /** Awaited before each round: waits a while for other load to end. */
  quiet: () => Promise<void>
}

export type Scenario = (context: Context) => Promise<Row[]>
