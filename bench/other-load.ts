import { readFile } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'

const SAMPLE_MS = 300
const BUSY_MAX = 0.2
const IDLE_FIELDS = [3, 4]

/** Waits for an otherwise idle machine before each round, and remembers the load that it found. */
export class OtherLoad {
  #patienceMs: number
  /** Share of the cores in use just before each round. */
  readonly found: number[] = []

  /** `patienceMs`: maximum wait in the whole run. */
  constructor(patienceMs: number) {
    this.#patienceMs = patienceMs
  }

  async quiet(): Promise<void> {
    for (;;) {
      const busy = await busyShare()
      if (busy > BUSY_MAX && this.#patienceMs > 0) {
        this.#patienceMs -= SAMPLE_MS
        continue
      }
      this.found.push(busy)
      return
    }
  }
}

async function busyShare(): Promise<number> {
  const before = await ticks()
  await pause(SAMPLE_MS)
  const after = await ticks()
  return 1 - (after.idle - before.idle) / (after.all - before.all)
}

/** Reads /proc/stat (proc_stat(5)): user, nice, system, idle, iowait, … */
async function ticks(): Promise<{ idle: number; all: number }> {
  const [line = ''] = (await readFile('/proc/stat', 'utf8')).split('\n')
  const fields = line.trim().split(/\s+/).slice(1, 9).map(Number)
  const sum = (figures: number[]) => figures.reduce((total, figure) => total + figure, 0)
  return { idle: sum(fields.filter((_, index) => IDLE_FIELDS.includes(index))), all: sum(fields) }
}
