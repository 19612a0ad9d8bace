import { describe, expect, test } from 'vitest'
import { type FieldError, InvalidRequestError } from '../../src/core/errors.ts'
import { DEFAULT_WORKER_SIZES } from '../../src/core/worker-sizes.ts'
import { fieldErrors, parseWith } from '../../src/wire/fields.ts'
import { gitConfigSchema } from '../../src/wire/git-config.ts'
import { parseJson } from '../../src/wire/json.ts'
import {
  type BackendRules,
  maskedWorkerConfig,
  parseWorkerFile,
  toWorkerConfig,
  WORKER_CONFIG_FIELDS,
  workerConfigSchema,
} from '../../src/wire/worker-config.ts'

/** As the route does it. */
function parse(config: unknown, backend: BackendRules['backend'] = 'kubernetes') {
  const path = ['worker_config']
  const fields = parseWith(workerConfigSchema, config, path)
  return toWorkerConfig(fields, { path, rules: { backend, sizes: DEFAULT_WORKER_SIZES } })
}

function parseFile(json: string) {
  return parseWorkerFile(Buffer.from(json), { backend: 'docker', sizes: DEFAULT_WORKER_SIZES })
}

function errorsOf(config: unknown, backend?: BackendRules['backend']): readonly FieldError[] {
  try {
    parse(config, backend)
  } catch (err) {
    if (err instanceof InvalidRequestError) return err.errors
    throw err
  }
  return []
}

function base64(value: unknown): string {
  const bytes =
    value instanceof Buffer
      ? value
      : Buffer.from(typeof value === 'string' ? value : JSON.stringify(value))
  return bytes.toString('base64')
}

const REPOSITORY = 'https://github.com/example/repo.git'

describe('fields', () => {
  /** For each field: values that must be refused, with what the user is told to look at. */
  const refused: Record<string, unknown[]> = {
    worker_image: [1, true, {}, [], 'two\nlines', 'nul\0', 'x'.repeat(513), '\ud800'],
    worker_size: [1, true, {}, [], 'Gigantic', 'Small ', 'x'.repeat(101)],
    env_variables: ['A=1', 1, true, [], [['A', '1']]],
    personal_secrets: [
      'git_secret',
      1,
      {},
      [1],
      [null],
      [''],
      ['a:b-c'],
      ['a:'],
      ['a:TASK_ID'],
      ['TASK_ID'],
      ['a\0'],
      Array(1001).fill('a'),
    ],
    shared_secrets: ['git_secret', 1, {}, [1], [null], [''], ['a\nb'], Array(1001).fill('a')],
    git_configs: [{}, 'https://x', [{}], [null], [1], Array(101).fill({ remote_url: REPOSITORY })],
    startup_script: [1, true, {}, ['echo'], 'nul\0', 'x'.repeat(1_000_001), '\udc00'],
    image_config: [1, true, 'always', []],
    log_level: [1, true, {}, [], 'IN\nFO', 'x'.repeat(51)],
    modules_log_level: [1, true, [], { urllib3: 1 }, { urllib3: null }],
    service_type: [1, {}, 'cloud', 'Workspace '],
    network_protocol: [1, {}, 'ftp', 'HTTPS '],
    interactive: [1, 0, 'true', {}, []],
    bypass_ssl_verification: [1, 0, 'false', {}, []],
    service_url: [1, {}, [], 'a\nb', 'x'.repeat(2049)],
    email: [1, {}, [], 'a\nb', 'x'.repeat(321)],
    refresh_token: [1, {}, [], 'nul\0', 'x'.repeat(65_537)],
    additional_params: [1, {}, [], true, 'x'.repeat(2_000_001)],
    distributed_config: [{}, { job_type: 'spark' }, 'spark', 1, true],
  }

  test('the table covers every field of WorkerConfig', () => {
    expect(Object.keys(refused).sort()).toEqual(WORKER_CONFIG_FIELDS.toSorted())
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
    const fields = WORKER_CONFIG_FIELDS
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
        'github.com:example/repo.git',
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
    secret_name: [1, {}, [], 'a\nb', 'x'.repeat(256)],
    // Without a secret there is nothing to save.
    save_secret: [1, 'true', {}, [], true],
    username: [1, {}, [], 'a\nb', 'x'.repeat(256)],
    local_path: [
      ...[
        1,
        {},
        [],
        'a\0b',
        'x'.repeat(1025),
        '/srv/repo',
        '/home/ubuntu',
        '~root/repo',
        '~',
        '~/',
        '.',
      ],
      ...['..', '../repo', '~/../repo', 'a/../../repo', '~//', './.'],
    ],
    branch: [1, {}, [], 'a\nb', '--upload-pack=id', 'x'.repeat(256)],
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

describe('what counts as absent', () => {
  test.each(['', 'None', null])(
    '%j in any optional field, and in what is nested in it',
    (absent) => {
      const outright = Object.fromEntries(WORKER_CONFIG_FIELDS.map((field) => [field, absent]))
      expect(parse(outright)).toEqual({})
      const git = Object.fromEntries(
        Object.keys(gitConfigSchema.shape).map((field) => [field, absent]),
      )
      expect(
        parse({
          git_configs: [{ ...git, remote_url: REPOSITORY }],
          image_config: { pull_policy: absent, repo_username: absent, builder: absent },
          additional_params: base64({
            ...{ startup_script_b64: absent, PRT_LOG_LEVEL: absent, PRT_INTERACTIVE: absent },
            ...{ distributed_conf_dict: absent, image_pull_policy: absent, worker_size: absent },
          }),
        }),
      ).toEqual({ gitConfigs: [{ remoteUrl: REPOSITORY }], imageConfig: {} })
    },
  )

  test('but not among variables, nor in lists', () => {
    const env_variables = { EMPTY: '', NONE: 'None' }
    expect(parse({ env_variables })).toEqual({ envVariables: env_variables })
    expect(parse({ personal_secrets: ['None'] })).toEqual({ personalSecrets: ['None'] })
    expect(errorsOf({ shared_secrets: [''] })).toEqual([
      { path: 'worker_config.shared_secrets.0', message: 'must not be empty' },
    ])
  })

  test('a repository without its URL is told so', () => {
    expect(errorsOf({ git_configs: [{ remote_url: '' }] })).toEqual([
      { path: 'worker_config.git_configs.0.remote_url', message: 'is required' },
    ])
  })
})

describe('image_config', () => {
  const image_config = {
    ...{ repo_username: 'robot', repo_password: 'pass-word', repo_secret_name: 'regcred' },
    ...{ pull_policy: 'Always', builder: true, builder_capacity: 75 },
  }

  test('has the names of the SDK; what builds images has no effect', () => {
    for (const config of [
      { image_config },
      { additional_params: base64({ image_conf_dict: image_config }) },
    ]) {
      expect(parse(config)).toEqual({
        imageConfig: {
          ...{ username: 'robot', password: 'pass-word', pullSecretName: 'regcred' },
          pullPolicy: 'Always',
        },
        withoutEffect: ['image_config.builder', 'image_config.builder_capacity'],
      })
    }
  })

  test('takes our older names as well; those of the SDK win', () => {
    expect(parse({ image_config: { username: 'a', secret_name: 'b' } })).toEqual({
      imageConfig: { username: 'a', secretName: 'b' },
    })
    const both = { username: 'a', repo_username: 'c', repo_password: 'd', secret_name: 'b' }
    expect(parse({ image_config: both })).toEqual({
      imageConfig: { username: 'c', password: 'd', secretName: 'b' },
    })
  })

  test('a user name without a password is noted', () => {
    expect(parse({ image_config: { repo_username: 'a' } })).toEqual({
      imageConfig: { username: 'a' },
      withoutEffect: ['image_config.repo_username'],
    })
  })

  test('takes the pull policy of older SDKs', () => {
    const additional_params = base64({ image_pull_policy: 'Never' })
    expect(parse({ additional_params })).toEqual({ imageConfig: { pullPolicy: 'Never' } })
  })

  test('repo_secret_name is a secret of Kubernetes, and refused on Docker', () => {
    const config = { image_config: { repo_secret_name: 'regcred' } }
    expect(errorsOf(config, 'docker')).toEqual([
      {
        path: 'worker_config.image_config.repo_secret_name',
        message: expect.stringContaining('Kubernetes'),
      },
    ])
    expect(parse(config, 'local')).toEqual({ imageConfig: { pullSecretName: 'regcred' } })
  })
})

describe('fields that nobody knows', () => {
  test('inside additional_params they are noted: a newer SDK must not break', () => {
    const additional_params = base64({ timezone: 'UTC', constructor: { prototype: {} } })
    expect(parse({ additional_params })).toEqual({
      withoutEffect: ['additional_params.timezone', 'additional_params.constructor'],
    })
  })

  test('their names are shown in one line each, and some of them alone', () => {
    const names = [
      'a\nb\u001b[31m',
      'x'.repeat(1000),
      ...Array.from({ length: 30 }, (_, n) => `n${n}`),
    ]
    const additional_params = base64(Object.fromEntries(names.map((name) => [name, 1])))
    const noted = parse({ additional_params }).withoutEffect ?? []
    expect(noted).toHaveLength(21)
    expect(noted.slice(0, 2)).toEqual([
      'additional_params.a?b?[31m',
      `additional_params.${'x'.repeat(100)}…`,
    ])
    expect(noted.at(-1)).toBe('additional_params (12 more fields)')
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

  test('local workers take any: they do not enforce it', () => {
    expect(parse({ worker_size: 'L-GPU' }, 'local')).toEqual({ workerSize: 'L-GPU' })
    expect(parse({ worker_size: 'small' }, 'local')).toEqual({ workerSize: 'Small' })
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

describe('numbers among variables', () => {
  const json =
    '{"A": 12345678901234567890, "B": 1.0, "C": 1e+21, "D": 1E5, "E": -0, "F": 0.10, "G": 7, "H": [1.0]}'
  const exact = {
    ...{ A: '12345678901234567890', B: '1.0', C: '1e+21', D: '1E5', E: '-0', F: '0.10', G: '7' },
  }
  const variables = json.replace(', "H": [1.0]', '')

  test('keep their digits, in requests, in additional_params and in worker files', () => {
    const request = parseJson(Buffer.from(`{"env_variables": ${variables}}`))
    expect(parse(request).envVariables).toEqual(exact)
    const additional_params = base64(`{"env_variables": ${variables}}`)
    expect(parse({ additional_params }).envVariables).toEqual(exact)
    expect(parseFile(`\ufeff{"env_variables": ${variables}}`).envVariables).toEqual(exact)
  })

  test('are numbers wherever else they stand', () => {
    const text =
      '{"a": [1.0, {"b": 2e0}], "env_variables_": {"c": 3.00}, "d": 4.0, "env_variables": {"e": 5.0}}'
    expect(parseJson(Buffer.from(text))).toEqual({
      ...{ a: [1, { b: 2 }], env_variables_: { c: 3 }, d: 4 },
      env_variables: { e: JSON.rawJSON('5.0') },
    })
  })

  test('in a list they are refused as any list', () => {
    expect(errorsOf(parseJson(Buffer.from(`{"env_variables": ${json}}`)))).toEqual([
      {
        path: 'worker_config.env_variables.H',
        message: 'must be a string, number or boolean',
      },
    ])
  })

  test('that are no JSON are told by their word and their place', () => {
    const additional_params = base64('{"env_variables": {"X": NaN}}')
    expect(errorsOf({ additional_params })).toEqual([
      {
        path: 'worker_config.additional_params.env_variables.X',
        message: 'NaN is not valid JSON: send null or a string',
      },
    ])
  })
})

describe('messages', () => {
  test('there is one for each fault, in words of ours', () => {
    const errors = errorsOf({
      ...{ worker_size: 5, interactive: 'yes', service_type: 'x', email: 'x'.repeat(321) },
      ...{
        env_variables: [],
        personal_secrets: 'a',
        git_configs: [{ remote_url: REPOSITORY, fetch_depth: 0 }],
      },
      ...{ shared_secrets: Array(1001).fill('a'), log_level: 'a\n\ud800' },
    })
    expect(
      Object.fromEntries(errors.map(({ path, message }) => [path.slice(14), message])),
    ).toEqual({
      worker_size: 'must be a string',
      interactive: 'must be true or false',
      service_type: 'must be one of cloud_worker, workspace',
      email: 'must be at most 320 characters long',
      env_variables: 'must be an object',
      personal_secrets: 'must be a list',
      shared_secrets: 'must be a list of at most 1000',
      'git_configs.0.fetch_depth': 'must be more than 0',
      log_level: 'must not contain control characters',
    })
    expect(errors).toHaveLength(9)
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
    ['bytes that are not UTF-8', Buffer.from([0x22, 0xff, 0x22]).toString('base64'), /UTF-8/],
    ['null', base64('null'), /JSON object/],
    ['a list', base64([]), /JSON object/],
    ['a string', base64('"{}"'), /JSON object/],
    ['a number', base64('1'), /JSON object/],
    ['nesting without end', base64('['.repeat(40_000)), /JSON/],
    ['nesting that closes', base64(`${'['.repeat(40_000)}${']'.repeat(40_000)}`), /JSON/],
    ['nesting of more', base64(`${'['.repeat(50_001)}${']'.repeat(50_001)}`), /50000 values/],
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
    [
      { git_configs: [{ remote_url: REPOSITORY, brunch: 'a' }] },
      'git_configs.0.brunch',
      'unknown field',
    ],
    [{ PRT_INTERACTIVE: 1 }, 'PRT_INTERACTIVE', 'must be true or false'],
    [{ startup_script_b64: '%' }, 'startup_script_b64', 'is not base64 of UTF-8 text'],
    [
      { startup_script_b64: base64(Buffer.from([0xff])) },
      'startup_script_b64',
      'is not base64 of UTF-8 text',
    ],
    [{ image_pull_policy: 'Sometimes' }, 'image_pull_policy', /Always/],
    [{ distributed_conf_dict: { job_type: 'spark' } }, 'distributed_conf_dict', 'not supported'],
    [{ worker_size: 'Gigantic' }, 'worker_size', /must be one of/],
    [{ interactive: 'yes' }, 'interactive', 'must be true or false'],
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
      const fields = WORKER_CONFIG_FIELDS.map((field) => [field, absent])
      expect(parseFile(JSON.stringify(Object.fromEntries(fields)))).toEqual({})
    }
  })

  test('they count as absent inside additional_params too, where the SDK puts most fields', () => {
    const additional_params = base64({
      ...{ worker_size: 'None', log_level: '', email: 'None', interactive: 'None' },
      startup_script: null,
      env_variables: { A: '1' },
    })
    expect(parseFile(JSON.stringify({ worker_image: 'None', additional_params }))).toEqual({
      envVariables: { A: '1' },
    })
  })

  test('what is there is parsed as in a request', () => {
    const file = {
      worker_size: 'SMALL',
      log_level: 'None',
      additional_params: base64({ env_variables: { A: 1 } }),
    }
    expect(parseFile(JSON.stringify(file))).toEqual({
      workerSize: 'Small',
      envVariables: { A: '1' },
    })
  })

  test.each(['', '{', '[]', 'null', '"text"', '1', '{"a":1}', '{"worker_size":"x"}'])(
    'the content %j is refused',
    (json) => {
      expect(() => parseFile(json)).toThrow()
    },
  )

  test('a wrong field is named by its path in the file', () => {
    expect(() => parseFile('{"worker_sise": "Small"}')).toThrow('worker_sise: unknown field')
    expect(() =>
      parseFile(JSON.stringify({ additional_params: base64({ worker_size: 'Gigantic' }) })),
    ).toThrow('additional_params.worker_size: must be one of')
  })

  test('a syntax error repeats nothing of the file, which may hold a token', () => {
    let message = ''
    try {
      parseFile('{"refresh_token": a-secret}')
    } catch (err) {
      message = String(err)
    }
    expect(message).not.toBe('')
    expect(message).not.toContain('secret')
  })
})

describe('maskedWorkerConfig', () => {
  test('a password is masked', () => {
    const config = parse({ image_config: { repo_username: 'robot', repo_password: 'pass-word' } })
    expect(maskedWorkerConfig(config)).toEqual({
      image_config: { repo_username: 'robot', repo_password: '***' },
    })
  })

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
