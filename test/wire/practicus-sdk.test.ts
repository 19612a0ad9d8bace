import { describe, expect, test } from 'vitest'
import { InvalidRequestError } from '../../src/core/errors.ts'
import type { WorkerConfig } from '../../src/core/worker-config.ts'
import { DEFAULT_WORKER_SIZES } from '../../src/core/worker-sizes.ts'
import { parseWith } from '../../src/wire/fields.ts'
import { parseJson } from '../../src/wire/json.ts'
import {
  parseWorkerFile,
  toWorkerConfig,
  workerConfigSchema,
} from '../../src/wire/worker-config.ts'
import {
  decodeWorkerFile,
  encodeWorkerFile,
  type WorkerConfigInput,
} from '../../src/wire/worker-file.ts'
import { cases, MEANING, meaningOf } from '../helpers/practicus-dumps.ts'

/** Written with fields that are empty, or with another spelling of what they mean: not what we write. */
const SPELLED_OTHERWISE = ['original default_worker.json', 'empty strings']

test('the table covers every case', () => {
  expect(Object.keys(MEANING)).toEqual(cases.map((dump) => dump.case))
})

const rules = { backend: 'local', sizes: DEFAULT_WORKER_SIZES } as const

function asRequest(json: string): WorkerConfig {
  const at = ['worker_config']
  const fields = parseWith(workerConfigSchema, parseJson(Buffer.from(json)), at)
  return toWorkerConfig(fields, { path: at, rules })
}

describe.each(cases)('$case', (dump) => {
  const meaning = meaningOf(dump.case)

  test.each(['model_dump_json_exclude_none', 'model_dump_json'] as const)(
    'as %s writes it, it is taken as the SDK means it, or refused by the name of the field',
    (form) => {
      if ('refused' in meaning) {
        for (const read of [
          asRequest,
          (json: string) => parseWorkerFile(Buffer.from(json), rules),
        ]) {
          const errors = errorsOf(() => read(dump[form]))
          const [first] = errors
          expect(first?.path.replace('worker_config.', '')).toBe(
            `additional_params.${meaning.refused}`,
          )
          expect(first?.message).toMatch(meaning.why)
        }
      } else {
        expect(asRequest(dump[form])).toEqual(meaning)
        expect(parseWorkerFile(Buffer.from(dump[form]), rules)).toEqual(meaning)
      }
    },
  )
})

const written = cases.filter(
  (dump) => !('refused' in meaningOf(dump.case)) && !SPELLED_OTHERWISE.includes(dump.case),
)

test.each(written)(
  '$case is written as the SDK writes it, byte for byte, from its fields and from itself',
  (dump) => {
    const fields = dump.fields as WorkerConfigInput
    expect(encodeWorkerFile(fields)).toBe(dump.model_dump_json_exclude_none)
    const itself = parseJson(Buffer.from(dump.model_dump_json)) as WorkerConfigInput
    expect(encodeWorkerFile(itself)).toBe(dump.model_dump_json_exclude_none)
    expect(encodeWorkerFile(decodeWorkerFile(itself))).toBe(dump.model_dump_json_exclude_none)
  },
)

function errorsOf(read: () => unknown) {
  try {
    read()
  } catch (err) {
    if (err instanceof InvalidRequestError) return err.errors
    throw err
  }
  return []
}
