/** Writes openapi/openapi.json from the routes; a test fails while the committed one is stale. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buildApp } from './app.ts'
import { loadConfig } from './config.ts'

const dataDir = await mkdtemp(join(tmpdir(), 'task-runner-openapi-'))
const app = await buildApp({ config: loadConfig({ DATA_DIR: dataDir, LOG_LEVEL: 'warn' }) })
const document = `${JSON.stringify(app.http.swagger(), null, 2)}\n`
await app.http.close()
await rm(dataDir, { recursive: true })
await writeFile(new URL('../openapi/openapi.json', import.meta.url), document)
