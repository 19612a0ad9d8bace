import type { Row } from './report.ts'

export interface Context {
  quick: boolean
  /** Options for the service's process, such as `--cpu-prof`. */
  nodeOptions: readonly string[]
  /** Prints progress. */
  note: (text: string) => void
  /** Waits a while for other load to end; called before each round. */
  quiet: () => Promise<void>
}

export type Scenario = (context: Context) => Promise<Row[]>
