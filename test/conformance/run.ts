/** The command: runs the conformance suite against whatever answers at `--url`. */
import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const HELP = `Checks an implementation of the task runner's HTTP API, from outside, guarantee by guarantee.

  npm run conformance -- --url http://host:3000 [--token TOKEN] [--callback-host HOST]

  --url URL             where the service answers, with its base path if it has one;
                        without it, this project's own service is started and tested
  --token TOKEN         bearer token of the service (or TARGET_TOKEN in the environment);
                        without it, the tests of 401 answers are skipped
  --callback-host HOST  name or address under which the service reaches this machine (default 127.0.0.1);
                        the suite receives callbacks there, and serves a git repository, on free ports.
                        Other than a loopback address, it listens on all interfaces
  --help                this text

The service under test needs
  - the sample task files of this project's tasks/ folder (parameters.sh, progress.sh, hello.py, hello.ts, failing.py);
  - permission to call the callback host (CALLBACK_ALLOWED_NETWORKS, GIT_ALLOWED_NETWORKS);
  - its sample callbacks (SAMPLE_CALLBACKS not switched off).
Task ids are new in each run, so it can be repeated against a live service; it removes the workers that it made.
Exit code: 0 when every guarantee holds, 1 when one does not, 2 when the arguments are wrong.
`

const options = {
  url: { type: 'string' },
  token: { type: 'string' },
  'callback-host': { type: 'string' },
  help: { type: 'boolean' },
} as const

const values = readArguments()
if (values.help) {
  process.stdout.write(HELP)
  process.exit(0)
}

const vitest = fileURLToPath(new URL('vitest.mjs', import.meta.resolve('vitest/package.json')))
const config = fileURLToPath(new URL('vitest.config.ts', import.meta.url))
const child = spawn(process.execPath, [vitest, 'run', '--config', config], {
  stdio: 'inherit',
  env: {
    ...process.env,
    ...(values.url === undefined ? {} : { TARGET_URL: values.url }),
    ...(values.token === undefined ? {} : { TARGET_TOKEN: values.token }),
    ...(values['callback-host'] === undefined ? {} : { CALLBACK_HOST: values['callback-host'] }),
  },
})
child.on('exit', (code) => process.exit(code ?? 1))

function readArguments() {
  try {
    const { values } = parseArgs({ options })
    if (values.url !== undefined && !/^https?:$/.test(URL.parse(values.url)?.protocol ?? '')) {
      throw new Error(`--url: "${values.url}" is not an http(s) URL`)
    }
    return values
  } catch (err) {
    process.stderr.write(`${err instanceof Error ? err.message : err}\n\n${HELP}`)
    process.exit(2)
  }
}
