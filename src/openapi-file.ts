/** Writes openapi/openapi.json from the routes; a test fails while the committed one is stale. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buildApp } from './app.ts'
import { loadConfig } from './config.ts'

const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-openapi-'))
// Most services have tokens, so the document describes one that has. The token is not published.
const env = { DATA_DIR: dataDir, LOG_LEVEL: 'warn', API_TOKENS: 'unused' }
const app = await buildApp({ config: loadConfig(env) })
const document = `${JSON.stringify(app.http.swagger(), null, 2)}\n`
await app.http.close()
await rm(dataDir, { recursive: true })
await writeFile(new URL('../openapi/openapi.json', import.meta.url), document)
