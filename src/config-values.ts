/** Types of environment variables, with messages for invalid values. */
import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { z } from 'zod'
import type { WorkerSizes } from './core/worker-sizes.ts'
import { isNetwork } from './net/address-guard.ts'

/** Rejects a value with a message. */
export function refuse(ctx: z.core.$RefinementCtx, message: string): never {
  ctx.addIssue({ code: 'custom', message })
  return z.NEVER
}

export const text = z
  .string()
  .trim()
  .min(1, { abort: true, error: 'is blank: set a value, or unset it' })
export const path = text.transform((path) => resolve(path))
const file = text.transform((path, ctx) => {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return refuse(ctx, 'the file cannot be read')
  }
})
const itemsOf = (text: string) =>
  text
    .split(/[,\n]/)
    .map((item) => item.trim())
    .filter((item) => item !== '')
/** Items separated by commas or line breaks. */
export const list = text.transform(itemsOf)
export const listInFile = file.transform(itemsOf)
export const listOf = <T extends z.ZodType<unknown, string>>(item: T) => list.pipe(z.array(item))
export const oneOf = <const T extends readonly string[]>(...values: T) =>
  text.pipe(z.enum(values, `must be one of ${values.join(', ')}`))
const numeric = (isRight: (value: number) => boolean, must: string) =>
  text.transform(Number).refine(isRight, `must be ${must}`)
export const whole = (min: number, max: number) =>
  numeric(
    (value) => Number.isInteger(value) && value >= min && value <= max,
    `a whole number from ${min} to ${max}`,
  )
export const number = (min: number, max: number) =>
  numeric((value) => value >= min && value <= max, `a number from ${min} to ${max}`)
export const positive = (max: number) =>
  numeric((value) => value > 0 && value <= max, `a number above 0, at most ${max}`)
/** Limit of setTimeout: 2^31 ms, 24.8 days. */
export const SECONDS_MAX = 2_000_000
export const times = (factor: number) => (value: number) => value * factor
export const toMs = times(1000)

export const dnsLabel = text.regex(
  /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/,
  'must be a name of at most 63 lower case letters, digits and hyphens',
)
export const networks = listOf(
  z.string().refine(isNetwork, {
    error: ({ input }) => `"${input}" is not a CIDR, "private" or "loopback"`,
  }),
)
/** Absolute paths outside the folders that a container needs. */
export const WORKER_HOME = /^(?!\/(worker|tmp|dev|proc|sys)\b)(\/(?!\.{1,2}(\/|$))[\w.-]+)+$/

const sizes = z.record(
  z.string().min(1).max(100),
  z
    .strictObject({
      cpus: z.number().positive(),
      memory_mb: z.number().positive(),
      gpus: z.int().min(0).default(0),
    })
    .transform(({ cpus, memory_mb, gpus }) => {
      return { cpus, memoryBytes: Math.round(memory_mb * 1024 * 1024), gpus }
    }),
)
export const sizesFile = file.transform((json, ctx): WorkerSizes => {
  try {
    return sizes.parse(JSON.parse(json))
  } catch {
    return refuse(ctx, 'the file is not JSON like {"Small": {"cpus": 1, "memory_mb": 2048}, …}')
  }
})
