import type { Migration } from 'kysely/migration'
import * as tasksAndDeliveries from './migrations/0001-tasks-and-deliveries.ts'
import * as instances from './migrations/0002-instances.ts'
import * as listing from './migrations/0003-listing.ts'
import * as settings from './migrations/0004-settings.ts'
import * as redeliveries from './migrations/0005-redeliveries.ts'
import * as oneQueue from './migrations/0006-one-queue.ts'
import * as noLogCursors from './migrations/0007-no-log-cursors.ts'

/** Returns the migrations in order. `types`: the database's names for these types. */
export function migrations(types: {
  serial: string
  bytes: string
  hasSchemas: boolean
}): Record<string, Migration> {
  return {
    '0001-tasks-and-deliveries': { up: (db) => tasksAndDeliveries.up(db, types) },
    '0002-instances': { up: (db) => instances.up(db) },
    '0003-listing': { up: (db) => listing.up(db) },
    '0004-settings': { up: (db) => settings.up(db) },
    '0005-redeliveries': { up: (db) => redeliveries.up(db) },
    '0006-one-queue': { up: (db) => oneQueue.up(db, types) },
    '0007-no-log-cursors': { up: (db) => noLogCursors.up(db) },
  }
}
