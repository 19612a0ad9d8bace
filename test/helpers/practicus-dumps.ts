/** Worker configurations as the real Practicus SDK writes them: fixtures/practicus-sdk-dumps.json says how they were made. */
import { readFileSync } from 'node:fs'
import type { WorkerConfig } from '../../src/core/worker-config.ts'
import { parseJson } from '../../src/wire/json.ts'

export interface Dump {
  case: string
  /** As they were given; text where JSON cannot hold them. */
  fields: unknown
  model_dump_json_exclude_none: string
  model_dump_json: string
}

const path = new URL('../fixtures/practicus-sdk-dumps.json', import.meta.url)
// What stands in a file as 1.0 is to be compared digit for digit.
export const { cases } = parseJson(readFileSync(path)) as { cases: Dump[] }

/** What each configuration means in the SDK; or the field that is refused, with what is wrong. */
export const MEANING: Record<string, WorkerConfig | { refused: string; why: RegExp }> = {
  empty: {},
  'original basic: env str+int': {
    ...{ workerImage: 'practicus', workerSize: 'X-Small' },
    envVariables: { MY_FIRST_PARAM: 'VALUE1', MY_SECOND_PARAM: '123' },
  },
  'plain: size only': { workerSize: 'X-Small' },
  'original example: small + secret + git': {
    ...{ workerSize: 'Small', personalSecrets: ['git_secret'] },
    gitConfigs: [{ remoteUrl: 'https://github.com/example/repo.git', secretName: 'git_secret' }],
  },
  'original default_worker.json': { workerImage: 'practicus', workerSize: 'Small' },
  'service_url+email+refresh_token': {
    ...{ workerImage: 'practicus', workerSize: 'Small' },
    withoutEffect: ['service_url', 'email', 'refresh_token'],
  },
  'startup_script one line': {
    ...{ workerImage: 'practicus', workerSize: 'Small' },
    startupScript: 'echo pretend: pip install pandas',
  },
  log_level: { workerSize: 'Small', logLevel: 'DEBUG' },
  interactive: { workerSize: 'Small', withoutEffect: ['interactive'] },
  bypass_ssl_verification: { workerSize: 'Small', withoutEffect: ['bypass_ssl_verification'] },
  'image_config pull_policy': {
    ...{ workerImage: 'my-repo/my-image:1.2', workerSize: 'Small' },
    imageConfig: { pullPolicy: 'Always' },
  },
  'image_config repo_secret_name': {
    ...{ workerImage: 'my-repo/my-image:1.2', workerSize: 'Small' },
    imageConfig: { pullSecretName: 'registry_secret' },
  },
  builder: {
    ...{ workerImage: 'practicus-builder', workerSize: 'Medium', imageConfig: {} },
    withoutEffect: ['image_config.builder', 'image_config.builder_capacity'],
  },
  'dist spark': { refused: 'distributed_conf_dict', why: /^not supported$/ },
  'dist torch': { refused: 'distributed_conf_dict', why: /^not supported$/ },
  'service_type workspace': {
    ...{ workerImage: 'practicus', workerSize: 'Small' },
    withoutEffect: ['service_type', 'network_protocol'],
  },
  'service_type cloud_worker': {
    ...{ workerImage: 'practicus', workerSize: 'Small', withoutEffect: ['service_type'] },
  },
  'git no secret (secret_name="")': {
    workerSize: 'Small',
    gitConfigs: [{ remoteUrl: 'https://github.com/example/repo.git' }],
  },
  'git ssh scp url': {
    workerSize: 'Small',
    gitConfigs: [{ remoteUrl: 'ssh://git@github.com/example/repo.git', secretName: 'git_secret' }],
  },
  'secrets shared+personal': {
    ...{ workerSize: 'Small', personalSecrets: ['MY_SECRET'], sharedSecrets: ['SHARED_KEY'] },
  },
  'secrets with dash': { workerSize: 'Small', personalSecrets: ['git-secret'] },
  'secret rename NAME:ENV': { workerSize: 'Small', personalSecrets: ['MY_SECRET:NEW_ENV'] },
  'env odd types': {
    workerSize: 'Small',
    envVariables: {
      ...{ F: '1.0', F2: '0.1', E: '1e+21', BIG: '12345678901234567890' },
      ...{ T: 'true', FA: 'false', EMPTY: '' },
    },
  },
  'env None': { refused: 'env_variables.A', why: /string, number or boolean/ },
  'env list/dict': { refused: 'env_variables.L', why: /string, number or boolean/ },
  'env names odd': { refused: 'env_variables.my.param', why: /not a variable name/ },
  'env name with dash': { refused: 'env_variables.my-param', why: /not a variable name/ },
  'env int key': { refused: 'env_variables.1', why: /not a variable name/ },
  'env unicode': { workerSize: 'Small', envVariables: { GREETING: 'Günaydın 🌍 "q" \\n' } },
  'size L-GPU': { workerImage: 'practicus-gpu', workerSize: 'L-GPU' },
  'image_config empty': { workerSize: 'Small', imageConfig: {} },
  'empty strings': {},
  'env NaN/inf': { refused: 'env_variables.X', why: /^NaN is not valid JSON/ },
  'env reserved names': { refused: 'env_variables.TASK_ID', why: /is reserved/ },
}

export const meaningOf = (name: string) => MEANING[name] ?? { refused: '', why: /no meaning/ }
