import type { WorkerResources } from './ports.ts'

/** Resources by size name, in display order. */
export type WorkerSizes = Readonly<Record<string, WorkerResources>>

const GIBIBYTE = 2 ** 30

/** Sizes of the Practicus SDK. */
export const DEFAULT_WORKER_SIZES: WorkerSizes = {
  'X-Small': { cpus: 0.5, memoryBytes: GIBIBYTE, gpus: 0 },
  Small: { cpus: 1, memoryBytes: 2 * GIBIBYTE, gpus: 0 },
  Medium: { cpus: 2, memoryBytes: 4 * GIBIBYTE, gpus: 0 },
  Large: { cpus: 4, memoryBytes: 8 * GIBIBYTE, gpus: 0 },
  'X-Large': { cpus: 8, memoryBytes: 16 * GIBIBYTE, gpus: 0 },
  '2X-Large': { cpus: 16, memoryBytes: 32 * GIBIBYTE, gpus: 0 },
}

/** Returns the name as the table spells it; undefined: unknown. */
export function knownSize(name: string, sizes: WorkerSizes): string | undefined {
  return Object.keys(sizes).find((known) => known.toLowerCase() === name.toLowerCase())
}
