/** Schemathesis, with all its checks, against a running service: what its document says is what it does. */
import { createReadStream } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { expect, test } from 'vitest'
import { startStage } from '../../helpers/recovery.ts'
import { installed, outputOf } from '../clients.ts'

const SECONDS = Number(process.env.SCHEMATHESIS_SECONDS ?? 90)
/** Other seeds search elsewhere, and may find more. */
const SEED = process.env.SCHEMATHESIS_SEED ?? '1'
const TOKEN = 'token-of-the-test'
const TASKS = new URL('../../../tasks', import.meta.url).pathname

interface Finding {
  check: string
  /** Method and path. */
  to: string
  body: string
  answer: string
}

const isRefusedFor = (answer: string, field: RegExp) =>
  Object(JSON.parse(answer)).errors?.every(({ path }: { path: string }) => field.test(path))

/** Findings that are right as they are. */
const EXPECTED: { why: string; is: (finding: Finding) => boolean }[] = [
  {
    why: 'URLs, paths, secrets and base64 have more rules, also between fields, than a schema can say.',
    is: ({ check, to, answer }) =>
      to === 'POST /task-runner' &&
      check === 'positive_data_acceptance' &&
      isRefusedFor(
        answer,
        /^(callback_url$|worker_config\.(git_configs|image_config|\w+_secrets|env_variables|additional_params)\b)/,
      ),
  },
  {
    why: 'It would set a prototype in careless code, so no body may have it.',
    is: ({ check, answer }) =>
      check === 'positive_data_acceptance' && answer.includes('a field named __proto__'),
  },
  {
    why: 'What a string holds is not in the schema.',
    is: ({ check, to, body }) =>
      check === 'positive_data_acceptance' &&
      to === 'POST /sample-task-runner-callback2' &&
      body.startsWith('"'),
  },
  {
    why: 'A body that is too large is rejected before it is validated.',
    is: ({ answer }) => answer.includes('"code":"request_too_large"'),
  },
  {
    why: 'A body of `null` is no body to fastify.',
    is: ({ check, to, body }) =>
      to === 'POST /workers/cleanup' && check === 'negative_data_rejection' && body === 'null',
  },
  {
    why: 'The same path is that of a worker named "cleanup".',
    is: ({ check, to }) => to.endsWith(' /workers/cleanup') && check === 'allow_header_conformance',
  },
]

test.each([
  {
    name: 'with tokens',
    env: { API_TOKENS: TOKEN },
    args: ['-H', `Authorization: Bearer ${TOKEN}`],
  },
  { name: 'without tokens', env: {}, args: [] },
])('$name, there is no finding beyond those with a reason', async ({ env, args }) => {
  const folder = await mkdtemp(join(tmpdir(), 'task-runner-schemathesis-'))
  const report = join(folder, 'report.ndjson')
  try {
    await using stage = await startStage({ env: { TASKS_DIR: TASKS, ...env } })
    const service = await stage.start()
    const run = outputOf(
      installed('schemathesis/venv/bin/schemathesis'),
      [
        ...[
          'run',
          `${service.url}/openapi.json`,
          '--no-color',
          '--continue-on-failure',
          '--seed',
          SEED,
        ],
        ...['--max-time', String(SECONDS), '--report', 'ndjson', '--report-ndjson-path', report],
        ...args,
      ],
      { cwd: folder },
    )
    // It fails for each finding; what it found is in the report.
    const output = await run.catch((err: Error) => err.message)
    const { checks, findings } = await readReport(report)
    console.log(`${checks} checks, ${findings.length} findings`)
    expect(checks, output).toBeGreaterThan(1000)
    expect(findings.filter((each) => !EXPECTED.some(({ is }) => is(each)))).toEqual([])
    expect(service.log.filter((line) => /"level":(50|60)/.test(line))).toEqual([])
    expect(service.process.exitCode).toBeNull()
  } finally {
    await rm(folder, { recursive: true })
  }
})

async function readReport(path: string): Promise<{ checks: number; findings: Finding[] }> {
  let checks = 0
  const findings: Finding[] = []
  for await (const line of createInterface(createReadStream(path))) {
    const { recorder } = Object(JSON.parse(line).ScenarioFinished)
    for (const [id, results] of Object.entries<Record<string, string>[]>(recorder?.checks ?? {})) {
      const { request, response } = recorder.interactions[id]
      for (const { name = '', status } of results) {
        checks += 1
        if (status !== 'failure') continue
        const to = `${request.method} ${new URL(request.uri).pathname}`
        const [body, answer] = [textOf(request.body), textOf(response?.content)]
        findings.push({ check: name, to, body, answer })
      }
    }
  }
  return { checks, findings }
}

function textOf(body: { $base64?: string } | null | undefined): string {
  return Buffer.from(body?.$base64 ?? '', 'base64').toString()
}
