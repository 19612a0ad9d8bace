import { describe, expect, test } from 'vitest'
import { type FieldError, InvalidRequestError } from '../../src/core/errors.ts'
import { DEFAULT_WORKER_SIZES } from '../../src/core/worker-sizes.ts'
import { fieldErrors, parseWith } from '../../src/wire/fields.ts'
import { gitConfigSchema } from '../../src/wire/git-config.ts'
import {
  maskedWorkerConfig,
  parseWorkerFile,
  toWorkerConfig,
  workerConfigSchema,
} from '../../src/wire/worker-config.ts'

/** As the route does it. */
function parse(config: unknown) {
  const path = ['worker_config']
  return toWorkerConfig(parseWith(workerConfigSchema, config, path), {
    path,
    sizes: DEFAULT_WORKER_SIZES,
  })
}

function errorsOf(config: unknown): readonly FieldError[] {
  try {
    parse(config)
  } catch (err) {
    if (err instanceof InvalidRequestError) return err.errors
    throw err
  }
  return []
}

function base64(value: unknown): string {
  return Buffer.from(typeof value === 'string' ? value : JSON.stringify(value)).toString('base64')
}

const REPOSITORY = 'https://github.com/example/repo.git'

describe('fields', () => {
  /** For each field: values that must be refused, with what the user is told to look at. */
  const refused: Record<string, unknown[]> = {
    worker_image: [1, true, {}, [], '', 'two\nlines', 'nul\0', 'x'.repeat(513), '\ud800'],
    worker_size: [1, true, {}, [], '', 'Gigantic', 'Small ', 'x'.repeat(101)],
    env_variables: ['A=1', 1, true, [], [['A', '1']]],
    personal_secrets: [
      'git_secret',
      1,
      {},
      [1],
      [null],
      [''],
      ['a-b'],
      ['../a'],
      ['TASK_ID'],
      ['a\0'],
      Array(1001).fill('a'),
    ],
    shared_secrets: ['git_secret', 1, {}, [1], [null], [''], ['a\nb'], Array(1001).fill('a')],
    git_configs: [{}, 'https://x', [{}], [null], [1], Array(101).fill({ remote_url: REPOSITORY })],
    startup_script: [1, true, {}, ['echo'], 'nul\0', 'x'.repeat(1_000_001), '\udc00'],
    image_config: [1, true, 'always', []],
    log_level: [1, true, {}, [], '', 'IN\nFO', 'x'.repeat(51)],
    modules_log_level: [1, true, [], '', { urllib3: 1 }, { urllib3: null }],
    service_type: [1, {}, '', 'cloud', 'Workspace '],
    network_protocol: [1, {}, '', 'ftp', 'HTTPS '],
    interactive: [1, 0, 'true', '', {}, []],
    bypass_ssl_verification: [1, 0, 'false', '', {}, []],
    service_url: [1, {}, [], '', 'a\nb', 'x'.repeat(2049)],
    email: [1, {}, [], '', 'a\nb', 'x'.repeat(321)],
    refresh_token: [1, {}, [], 'nul\0', 'x'.repeat(65_537)],
    additional_params: [1, {}, [], true, 'x'.repeat(2_000_001)],
    distributed_config: [{}, { job_type: 'spark' }, 'spark', 1, true],
  }

  test('the table covers every field of WorkerConfig', () => {
    expect(Object.keys(refused).sort()).toEqual(Object.keys(workerConfigSchema.shape).sort())
  })

  test.each(
    Object.entries(refused).flatMap(([field, values]) =>
      values.map((value) => [field, JSON.stringify(value)?.slice(0, 40), value] as const),
    ),
  )('%s: %s is refused by the path of the field', (field, _shown, value) => {
    const errors = errorsOf({ [field]: value })
    expect(errors).not.toEqual([])
    for (const { path, message } of errors) {
      expect(`${path}.`).toMatch(new RegExp(`^worker_config\\.${field}\\.`))
      expect(message).not.toBe('')
    }
  })

  test('every field may be null, and counts as absent then', () => {
    const fields = Object.keys(workerConfigSchema.shape)
    expect(parse(Object.fromEntries(fields.map((field) => [field, null])))).toEqual({})
    expect(parse({})).toEqual({})
  })

  test.each([null, undefined, 'small', 1, true, []])(
    'a worker_config of %j is refused as a whole',
    (config) => {
      expect(errorsOf(config)).toMatchObject([{ path: 'worker_config' }])
    },
  )

  test('each valid field reaches the domain', () => {
    expect(
      parse({
        worker_image: 'practicus-minimal',
        worker_size: 'small',
        env_variables: { A: '1' },
        startup_script: 'echo a\necho b\n',
        log_level: 'DEBUG',
        modules_log_level: 'urllib3:WARNING',
        personal_secrets: ['git_secret', 'other'],
        shared_secrets: [],
        git_configs: [{ remote_url: REPOSITORY, fetch_depth: 1, username: null }],
        distributed_config: null,
      }),
    ).toEqual({
      personalSecrets: ['git_secret', 'other'],
      sharedSecrets: [],
      gitConfigs: [{ remoteUrl: REPOSITORY, fetchDepth: 1 }],
      workerImage: 'practicus-minimal',
      workerSize: 'Small',
      envVariables: { A: '1' },
      startupScript: 'echo a\necho b\n',
      logLevel: 'DEBUG',
      modulesLogLevel: 'urllib3:WARNING',
    })
  })

  test('modules_log_level may be an object, and is handed on as JSON', () => {
    expect(parse({ modules_log_level: { urllib3: 'ERROR' } })).toEqual({
      modulesLogLevel: '{"urllib3":"ERROR"}',
    })
  })

  test('every field without effect that is set is remembered by name, and its value is not', () => {
    const config = parse({
      service_type: 'workspace',
      network_protocol: 'https',
      interactive: false,
      bypass_ssl_verification: true,
      service_url: 'https://service.example',
      email: 'someone@example.com',
      refresh_token: 'a-refresh-token',
      image_config: { registry_password: 'a-password' },
    })
    expect(config.withoutEffect?.toSorted()).toEqual([
      'bypass_ssl_verification',
      'email',
      'image_config.registry_password',
      'interactive',
      'network_protocol',
      'refresh_token',
      'service_type',
      'service_url',
    ])
    expect(JSON.stringify(config)).not.toMatch(/a-refresh-token|a-password|someone@/)
  })

  test('unknown fields are named, each of them', () => {
    expect(errorsOf({ worker_sise: 'Small', env_variable: {} })).toEqual([
      { path: 'worker_config.worker_sise', message: 'unknown field' },
      { path: 'worker_config.env_variable', message: 'unknown field' },
    ])
  })

  test('all wrong fields are told at once', () => {
    const paths = errorsOf({ worker_size: 1, interactive: 1, log_level: 2 }).map((e) => e.path)
    expect(paths.sort()).toEqual([
      'worker_config.interactive',
      'worker_config.log_level',
      'worker_config.worker_size',
    ])
  })

  test('messages never repeat a value', () => {
    const secret = 'a-secret-value'
    const errors = errorsOf({
      refresh_token: { secret },
      env_variables: { A: `${secret}\0`, B: [secret], C: `${secret}${'x'.repeat(200_000)}` },
      startup_script: `${secret}\0`,
      service_type: secret,
      git_configs: [{ remote_url: secret }],
    })
    expect(errors.length).toBeGreaterThanOrEqual(7)
    expect(JSON.stringify(errors)).not.toContain(secret)
  })
})

describe('GitConfig', () => {
  const refused: Record<string, unknown[]> = {
    remote_url: [
      ...[1, true, {}, [], null, '', 'repo', 'file:///etc', '/srv/repo', 'ext::sh -c id'],
      ...[
        '--upload-pack=id',
        'https://a b',
        'https://',
        'https://a\0b',
        `https://${'x'.repeat(2048)}`,
        'git@github.com:example/repo.git',
        'git://host/repo.git',
        'https://token@host/repo.git',
        'https://user:token@host/repo.git',
        'ssh://git:password@host/repo.git',
        'http://public.example\\@127.0.0.1/repo.git',
        // biome-ignore lint/suspicious/noTemplateCurlyInString: what a shell would make of it
        'ssh://git@a;touch${IFS}x;b/repo.git',
        ...['https://host', 'https://host/', 'https://host/.git', 'https://host/a/..%2f..'],
        ...['https://host/repo.git?a=b', 'https://host/repo.git#main', 'https://host/%ff'],
      ],
    ],
    secret_name: [1, {}, [], '', 'a\nb', '../a', 'a/b', '.a', 'x'.repeat(256)],
    // Without a secret there is nothing to save.
    save_secret: [1, 'true', {}, [], true],
    username: [1, {}, [], '', 'a\nb', 'x'.repeat(256)],
    local_path: [
      ...[1, {}, [], '', 'a\0b', 'x'.repeat(1025), '/srv/repo', '~root/repo', '~', '~/', '.'],
      ...['..', '../repo', '~/../repo', 'a/../../repo', '~//', './.'],
    ],
    branch: [1, {}, [], '', 'a\nb', '--upload-pack=id', 'x'.repeat(256)],
    sparse_checkout_folders: [
      ...['src', 1, {}, [1], [''], [null], ['--stdin'], ['../a'], Array(1001).fill('a')],
    ],
    fetch_depth: [0, -1, 1.5, '1', true, {}, [], 1e20],
  }

  test('the table covers every field', () => {
    expect(Object.keys(refused).sort()).toEqual(Object.keys(gitConfigSchema.shape).sort())
  })

  test.each(
    Object.entries(refused).flatMap(([field, values]) =>
      values.map((value) => [field, JSON.stringify(value).slice(0, 40), value] as const),
    ),
  )('%s: %s is refused by its full path', (field, _shown, value) => {
    const errors = errorsOf({ git_configs: [{ remote_url: REPOSITORY, [field]: value }] })
    expect(errors.map(({ path }) => path).join()).toMatch(
      new RegExp(`^worker_config\\.git_configs\\.0\\.${field}`),
    )
  })

  test('every field but remote_url may be null', () => {
    const fields = Object.keys(gitConfigSchema.shape).map((field) => [field, null])
    const config = { ...Object.fromEntries(fields), remote_url: REPOSITORY }
    expect(gitConfigSchema.safeParse(config).success).toBe(true)
  })

  test('a missing remote_url and an unknown field are named by their full path', () => {
    expect(errorsOf({ git_configs: [{ remote_url: REPOSITORY }, { brunch: 'main' }] })).toEqual([
      { path: 'worker_config.git_configs.1.remote_url', message: 'is required' },
      { path: 'worker_config.git_configs.1.brunch', message: 'unknown field' },
    ])
  })
})

describe('what this version cannot do is refused, not dropped', () => {
  test('distributed_config is refused with "not supported"', () => {
    const config = { distributed_config: { job_type: 'spark', initial_count: 2 } }
    expect(errorsOf(config)).toEqual([
      { path: 'worker_config.distributed_config', message: 'not supported' },
    ])
    expect(errorsOf({ additional_params: base64(config) })).toEqual([
      { path: 'worker_config.additional_params.distributed_config', message: 'not supported' },
    ])
  })
})

describe('worker_size', () => {
  test('an unknown one is not repeated', () => {
    const errors = errorsOf({ worker_size: 'a-secret-value' })
    expect(errors).toHaveLength(1)
    expect(JSON.stringify(errors)).not.toContain('a-secret-value')
  })

  test.each(Object.keys(DEFAULT_WORKER_SIZES))('%s is known in any case', (size) => {
    for (const written of [size, size.toLowerCase(), size.toUpperCase()]) {
      expect(parse({ worker_size: written })).toEqual({ workerSize: size })
    }
  })

  test('an unknown one is answered with those there are', () => {
    const [error] = errorsOf({ worker_size: 'Gigantic' })
    for (const size of Object.keys(DEFAULT_WORKER_SIZES)) expect(error?.message).toContain(size)
  })
})

describe('env_variables', () => {
  test('numbers and booleans become the text that JSON shows', () => {
    const env_variables = { A: 'x', B: 123, C: -1.5, D: true, E: false, F: 0, G: '', H: ' \n"$`\\' }
    expect(parse({ env_variables }).envVariables).toEqual({
      ...{ A: 'x', B: '123', C: '-1.5', D: 'true', E: 'false', F: '0', G: '', H: ' \n"$`\\' },
    })
  })

  test.each(['A=B', '', '1A', 'A B', 'A-B', 'A.B', 'Ä', 'A\n', '\nA', 'A\0', '$A', '%A%'])(
    'the malformed name %j is refused and named',
    (name) => {
      expect(errorsOf({ env_variables: { [name]: 'x' } })).toEqual([
        {
          path: `worker_config.env_variables.${name}`,
          message: expect.stringMatching(/not a variable name/),
        },
      ])
    },
  )

  test.each([
    ...['TASK_ID', 'TASK_FILE_NAME', 'TASK_RUNNER_FOLDER', 'WORKER_NAME'],
    ...['OPTIND', 'PPID', 'UID', 'EUID', 'SHELLOPTS', 'BASHOPTS', 'BASH_VERSINFO', '_'],
  ])('%s is refused as reserved: shells will not assign it, or it is ours', (name) => {
    expect(errorsOf({ env_variables: { [name]: 'x' } })).toEqual([
      { path: `worker_config.env_variables.${name}`, message: 'is reserved' },
    ])
  })

  test('names that only look reserved pass', () => {
    const env_variables = { task_id: 'a', TASK_ID_2: 'b', _A: 'c', OPTARG: 'd', PATH: '/bin' }
    expect(parse({ env_variables }).envVariables).toEqual(env_variables)
  })

  test.each([[null], [[]], [{}], [['x']]])(
    'a value of %j is refused, saying what it may be',
    (value) => {
      expect(errorsOf({ env_variables: { A: value } })).toEqual([
        {
          path: 'worker_config.env_variables.A',
          message: expect.stringMatching(/string.*number.*boolean/),
        },
      ])
    },
  )

  test('NUL and half characters in a value are refused by name', () => {
    expect(errorsOf({ env_variables: { A: 'x\0y', B: '\ud800', C: 'fine' } })).toEqual([
      { path: 'worker_config.env_variables.A', message: 'must not contain NUL characters' },
      { path: 'worker_config.env_variables.B', message: 'must be well-formed Unicode' },
    ])
  })

  test('a variable longer than Linux takes is refused, measured in bytes with its name', () => {
    const fits = 'x'.repeat(131_071 - 'A='.length)
    expect(parse({ env_variables: { A: fits } }).envVariables).toEqual({ A: fits })
    for (const value of [`${fits}x`, 'ü'.repeat(70_000)]) {
      expect(errorsOf({ env_variables: { A: value } })).toEqual([
        {
          path: 'worker_config.env_variables.A',
          message: expect.stringMatching(/too long|Too big/),
        },
      ])
    }
  })

  test('variables that are too long together are refused', () => {
    const value = 'x'.repeat(100_000)
    const many = Object.fromEntries(Array.from({ length: 11 }, (_, index) => [`V${index}`, value]))
    expect(errorsOf({ env_variables: many })).toEqual([
      { path: 'worker_config.env_variables', message: expect.stringContaining('too long') },
    ])
  })
})

describe('additional_params', () => {
  test('is decoded, as the Practicus SDK writes it', () => {
    const additional_params = base64({
      env_variables: { MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: 123 },
      startup_script: 'echo hello',
      log_level: null,
    })
    expect(parse({ worker_size: 'X-Small', additional_params })).toEqual({
      workerSize: 'X-Small',
      envVariables: { MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: '123' },
      startupScript: 'echo hello',
    })
  })

  test('variables merge name by name, and those given outright win', () => {
    const additional_params = base64({ env_variables: { A: 'hidden', B: 'hidden' } })
    expect(parse({ env_variables: { B: 'outright', C: 'outright' }, additional_params })).toEqual({
      envVariables: { A: 'hidden', B: 'outright', C: 'outright' },
    })
  })

  test('a field given outright wins, one given as null does not', () => {
    const additional_params = base64({ worker_size: 'Large', log_level: 'DEBUG' })
    expect(parse({ worker_size: 'small', log_level: null, additional_params })).toEqual({
      workerSize: 'Small',
      logLevel: 'DEBUG',
    })
  })

  test('fields without effect are remembered from both places', () => {
    const additional_params = base64({ email: 'a@example.com', service_type: 'workspace' })
    const config = parse({ service_type: 'cloud_worker', interactive: true, additional_params })
    expect(config.withoutEffect?.toSorted()).toEqual(['email', 'interactive', 'service_type'])
  })

  test('line breaks in base64, missing padding, and emptiness are taken', () => {
    const whole = base64({ log_level: 'DEBUG', modules_log_level: 'a' })
    const broken = `${whole.slice(0, 12)}\r\n${whole.slice(12)}\n`
    for (const additional_params of [whole, broken, whole.replace(/=+$/, '')]) {
      expect(parse({ additional_params })).toEqual({ logLevel: 'DEBUG', modulesLogLevel: 'a' })
    }
    for (const additional_params of ['', base64({}), null]) {
      expect(parse({ additional_params })).toEqual({})
    }
  })

  test.each([
    ['characters that are not base64', '{"worker_size":"Small"}', /base64/],
    ['padding in the middle', 'e30=e30=', /base64/],
    ['too short for a byte', 'a', /base64|JSON/],
    ['text that is not JSON', base64('worker_size: Small'), /JSON/],
    ['JSON cut short', base64('{"worker_size":"Sm'), /JSON/],
    ['bytes that are not UTF-8', Buffer.from([0x22, 0xff, 0x22]).toString('base64'), /JSON/],
    ['null', base64('null'), /JSON object/],
    ['a list', base64([]), /JSON object/],
    ['a string', base64('"{}"'), /JSON object/],
    ['a number', base64('1'), /JSON object/],
    ['nesting without end', base64('['.repeat(100_000)), /JSON/],
    ['nesting that closes', base64(`${'['.repeat(100_000)}${']'.repeat(100_000)}`), /JSON/],
    ['nesting of more', base64(`${'['.repeat(200_001)}${']'.repeat(200_001)}`), /200000 values/],
  ])('%s: refused by path, without repeating it', (_name, additional_params, message) => {
    expect(errorsOf({ additional_params })).toEqual([
      { path: 'worker_config.additional_params', message: expect.stringMatching(message) },
    ])
  })

  test.each([
    '{"__proto__": {"worker_size": "Small"}}',
    '{"env_variables": {"__proto__": "x"}}',
    '{"image_config": {"a": {"__proto__": {"polluted": true}}}}',
    '{"\\u005f_proto__": {"polluted": true}}',
  ])('%s is refused, and nothing is polluted', (json) => {
    expect(errorsOf({ additional_params: base64(json) })).toMatchObject([
      { path: expect.stringMatching(/^worker_config\.additional_params/) },
    ])
    expect({}).not.toHaveProperty('polluted')
    expect({}).not.toHaveProperty('worker_size')
  })

  test.each([
    [{ worker_sise: 'Small' }, 'worker_sise', 'unknown field'],
    [{ additional_params: 'e30=' }, 'additional_params', 'unknown field'],
    [{ constructor: { prototype: {} } }, 'constructor', 'unknown field'],
    [{ worker_size: 'Gigantic' }, 'worker_size', /must be one of/],
    [{ interactive: 'yes' }, 'interactive', /boolean/],
    [{ env_variables: { 'A=B': 'x' } }, 'env_variables.A=B', /not a variable name/],
    [{ env_variables: { TASK_ID: 'x' } }, 'env_variables.TASK_ID', 'is reserved'],
    [{ git_configs: [{}] }, 'git_configs.0.remote_url', 'is required'],
  ])('%j inside is named with its full path', (content, path, message) => {
    expect(errorsOf({ additional_params: base64(content) })).toEqual([
      {
        path: `worker_config.additional_params.${path}`,
        message: typeof message === 'string' ? message : expect.stringMatching(message),
      },
    ])
  })

  test('a secret inside is repeated by no message', () => {
    const secret = 'a-secret-value'
    const contents = [
      { refresh_token: { secret } },
      { worker_size: secret },
      `{"refresh_token": ${secret}`,
    ]
    for (const content of contents) {
      const errors = errorsOf({ additional_params: base64(content) })
      expect(errors).not.toEqual([])
      expect(JSON.stringify(errors)).not.toContain(secret)
    }
  })
})

describe('parseWorkerFile', () => {
  test('null, "" and "None" count as absent, in every field', () => {
    for (const absent of [null, '', 'None']) {
      const fields = Object.keys(workerConfigSchema.shape).map((field) => [field, absent])
      expect(parseWorkerFile(JSON.stringify(Object.fromEntries(fields)))).toEqual({})
    }
  })

  test('they count as absent inside additional_params too, where the SDK puts most fields', () => {
    const additional_params = base64({
      ...{ worker_size: 'None', log_level: '', email: 'None', interactive: 'None' },
      startup_script: null,
      env_variables: { A: '1' },
    })
    expect(parseWorkerFile(JSON.stringify({ worker_image: 'None', additional_params }))).toEqual({
      envVariables: { A: '1' },
    })
  })

  test('what is there is parsed as in a request', () => {
    const file = {
      worker_size: 'SMALL',
      log_level: 'None',
      additional_params: base64({ env_variables: { A: 1 } }),
    }
    expect(parseWorkerFile(JSON.stringify(file), DEFAULT_WORKER_SIZES)).toEqual({
      workerSize: 'Small',
      envVariables: { A: '1' },
    })
  })

  test.each(['', '{', '[]', 'null', '"text"', '1', '{"a":1}', '{"worker_size":"x"}'])(
    'the content %j is refused',
    (json) => {
      expect(() => parseWorkerFile(json, DEFAULT_WORKER_SIZES)).toThrow()
    },
  )

  test('a wrong field is named by its path in the file', () => {
    expect(() => parseWorkerFile('{"worker_sise": "Small"}')).toThrow('worker_sise: unknown field')
    expect(() =>
      parseWorkerFile(JSON.stringify({ additional_params: base64({ worker_sise: 'Small' }) })),
    ).toThrow('additional_params.worker_sise: unknown field')
  })

  test('a syntax error repeats nothing of the file, which may hold a token', () => {
    let message = ''
    try {
      parseWorkerFile('{"refresh_token": a-secret}')
    } catch (err) {
      message = String(err)
    }
    expect(message).not.toBe('')
    expect(message).not.toContain('secret')
  })
})

describe('maskedWorkerConfig', () => {
  test('values of variables are masked, names stay', () => {
    const config = parse({ worker_size: 'small', env_variables: { A: 'a-secret', B: 1 } })
    expect(maskedWorkerConfig(config)).toEqual({
      worker_size: 'Small',
      env_variables: { A: '***', B: '***' },
    })
  })
})

test('a hostile name of any length is cut in the answer', () => {
  const [error] = errorsOf({ ['x'.repeat(100_000)]: 1 })
  expect(error?.path.length).toBeLessThanOrEqual(201)
  const result = workerConfigSchema.safeParse({ 'a b': 1 })
  if (result.success) throw new Error('an unknown field passed')
  expect(fieldErrors(result.error)).toEqual([{ path: 'a b', message: 'unknown field' }])
})
