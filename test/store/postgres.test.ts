import { afterAll, beforeAll } from 'vitest'
import { openPostgres } from '../../src/store/postgres.ts'
import { type Postgres, startPostgres } from '../helpers/postgres.ts'
import { describeStores } from './contract.ts'

let postgres: Postgres

beforeAll(async () => {
  postgres = await startPostgres()
}, 60_000)
afterAll(() => postgres[Symbol.asyncDispose]())

describeStores('Postgres', async () =>
  openPostgres(await postgres.database(), { instance: 'here', poolSize: 10 }),
)
