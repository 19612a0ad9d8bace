import { execFileSync } from 'node:child_process'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { InvalidRequestError } from '../../src/core/errors.ts'
import {
  decodeWorkerFile,
  encodeWorkerFile,
  type WorkerConfigInput,
} from '../../src/wire/worker-file.ts'

/** What the Practicus SDK wrote. */
const WRITTEN =
  '{"worker_image":"practicus","worker_size":"X-Small","additional_params":"eyJlbnZfdmFyaWFibGVzIjogeyJNWV9GSVJTVF9QQVJBTSI6ICJWQUxVRTEiLCAiTVlfU0VDT05EX1BBUkFNIjogMTIzfX0="}'
const CONFIG: WorkerConfigInput = {
  worker_image: 'practicus',
  worker_size: 'X-Small',
  env_variables: { MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: 123 },
}

const additional = (file: string) =>
  Buffer.from(JSON.parse(file).additional_params, 'base64').toString()

describe('encodeWorkerFile', () => {
  test('writes what the SDK writes, byte for byte, nulls left out', () => {
    const nulls = { personal_secrets: null, startup_script: null, email: null, git_configs: null }
    expect(encodeWorkerFile({ ...CONFIG, ...nulls })).toBe(WRITTEN)
  })

  test('moves most fields, and leaves nulls out inside them as well', () => {
    const file = encodeWorkerFile({
      worker_size: 'Small',
      personal_secrets: ['git_secret'],
      git_configs: [{ remote_url: 'https://example.com/a.git', branch: null }],
      interactive: false,
    })
    expect(JSON.parse(file)).toEqual({
      worker_size: 'Small',
      additional_params: expect.any(String),
    })
    // The SDK refuses a repository without a secret's name, which may be empty.
    expect(additional(file)).toBe(
      '{"git_configs": [{"remote_url": "https://example.com/a.git", "secret_name": ""}], "PRT_INTERACTIVE": false, "personal_secrets": ["git_secret"]}',
    )
  })

  test('without such fields additional_params are empty, as the SDK writes them', () => {
    expect(encodeWorkerFile({ worker_size: 'Small' })).toBe(
      '{"worker_size":"Small","additional_params":"e30="}',
    )
    expect(encodeWorkerFile({})).toBe('{"additional_params":"e30="}')
  })

  test('names of ours become those of the SDK', () => {
    const file = encodeWorkerFile({
      image_config: { pull_policy: 'Always', username: 'robot', secret_name: 'registry' },
      modules_log_level: { urllib3: 'ERROR' },
      startup_script: '\necho hi\n',
    })
    expect(additional(file)).toBe(
      '{"image_conf_dict": {"repo_username": "robot", "pull_policy": "Always", "secret_name": "registry"}, "startup_script_b64": "ZWNobyBoaQ==", "PRT_MODULES_LOG_LEVEL": "{\\"urllib3\\":\\"ERROR\\"}"}',
    )
    expect(decodeWorkerFile(JSON.parse(file))).toMatchObject({
      image_config: { pull_policy: 'Always', repo_username: 'robot', secret_name: 'registry' },
      startup_script: 'echo hi',
    })
  })

  test('a file that was written before stays as it is', () => {
    expect(encodeWorkerFile(JSON.parse(WRITTEN))).toBe(WRITTEN)
    const more = { ...JSON.parse(WRITTEN), env_variables: { MY_SECOND_PARAM: 4, NEW: true } }
    expect(additional(encodeWorkerFile(more))).toContain('"MY_FIRST_PARAM": "VALUE1"')
  })

  test('any text is spelled as Python spells it', () => {
    const texts = fc.array(fc.string({ unit: 'grapheme' }), { minLength: 1, maxLength: 30 })
    fc.assert(
      fc.property(texts, (values) => {
        const clean = values.filter((value) => !value.includes('\0') && value.isWellFormed())
        const env_variables = Object.fromEntries(clean.map((value, index) => [`V${index}`, value]))
        fc.pre(clean.length > 0)
        const python = execFileSync(
          '/usr/bin/python3',
          ['-c', 'import json, sys; sys.stdout.write(json.dumps(json.load(sys.stdin)))'],
          { input: JSON.stringify({ env_variables }) },
        )
        expect(additional(encodeWorkerFile({ env_variables }))).toBe(python.toString())
      }),
      { numRuns: 15 },
    )
  })

  test('a wrong field is refused by its path', () => {
    const wrong = { log_level: 5 } as unknown as WorkerConfigInput
    expect(() => encodeWorkerFile(wrong)).toThrow(InvalidRequestError)
    expect(() => encodeWorkerFile(wrong)).toThrow('log_level')
    expect(() => encodeWorkerFile({ additional_params: '%' })).toThrow('additional_params')
  })
})

describe('decodeWorkerFile', () => {
  test('writes out what additional_params holds; fields given outright win, variables one by one', () => {
    expect(decodeWorkerFile(JSON.parse(WRITTEN))).toEqual(CONFIG)
    const over = { ...JSON.parse(WRITTEN), env_variables: { MY_SECOND_PARAM: 4 }, email: null }
    expect(decodeWorkerFile(over)).toEqual({
      ...CONFIG,
      env_variables: { MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: 4 },
    })
  })
})
