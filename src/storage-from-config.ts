/** Opens the store from the configuration: an SQLite file, or a shared Postgres. */
import { hostname } from 'node:os'
import { join } from 'node:path'
import type { Config } from './config.ts'
import type { Cluster, DeliveryStore, Hints, Logger } from './core/ports.ts'
import type { StatisticsStore } from './core/statistics.ts'
import { SqlDeliveryStore } from './store/delivery-store.ts'
import { keptInstanceName, newInstanceName } from './store/instance-name.ts'
import { lockFile } from './store/lock-file.ts'
import { deploymentOf, verifyKey } from './store/settings.ts'
import { openSqlite } from './store/sqlite.ts'
import { SqlStatistics } from './store/statistics.ts'
import { type Seal, SqlTaskStore } from './store/task-store.ts'

export interface Storage {
  /** Name of this instance, as shown by tasks. */
  instance: string
  /** Id that owns workers, 16 hex digits. All instances on one database have the same. */
  deployment: string
  tasks: SqlTaskStore
  deliveries: DeliveryStore
  statistics: StatisticsStore
  /** Undefined if no other instance uses this store. */
  shared?: {
    cluster: Cluster
    now: () => number
    /** Reaches the other instances. */
    hints: Hints
    /** Calls `hear` for the hints of other instances. */
    listen(hear: Hints): void
    /** Returns whether this instance does the periodic work. */
    leads(): Promise<boolean>
  }
  close(): Promise<void>
}

/** Throws if the data folder or the database is unavailable, or was sealed with another key. */
export async function openStorage(
  config: Config,
  seal: Seal,
  { log, onThreadDeath }: { log: Logger; onThreadDeath: (err: Error) => void },
): Promise<Storage> {
  return config.databaseUrl === undefined
    ? openEmbedded(config, seal, onThreadDeath)
    : openShared(config, { url: config.databaseUrl, seal, log })
}

async function openEmbedded(
  { dataDir }: Config,
  seal: Seal,
  onThreadDeath: (err: Error) => void,
): Promise<Storage> {
  const connection = await openSqlite(join(dataDir, 'task-runner.db'), onThreadDeath)
  try {
    await verifyKey(connection, seal)
    const deployment = await deploymentOf(connection)
    const instance = hostname()
    const tasks = new SqlTaskStore(connection, seal, { instance })
    return {
      instance,
      deployment,
      tasks,
      deliveries: new SqlDeliveryStore(connection, tasks),
      statistics: new SqlStatistics(connection),
      close: () => connection.close(),
    }
  } catch (err) {
    await connection.close()
    throw err
  }
}

async function openShared(
  config: Config,
  { url, seal, log }: { url: string; seal: Seal; log: Logger },
): Promise<Storage> {
  const [{ newClient, openPostgres }, { PostgresCluster }, { PostgresSession }] = await Promise.all(
    [
      import('./store/postgres.ts'),
      import('./store/postgres-cluster.ts'),
      import('./store/postgres-session.ts'),
    ],
  )
  const closing: Array<() => Promise<void>> = []
  const close = async () => {
    for (const each of closing.splice(0).reverse()) await each()
  }
  try {
    const hostBound = config.workerBackend === 'local'
    if (hostBound) closing.push(await lockFile(join(config.dataDir, 'lock')))
    const instance = hostBound
      ? await keptInstanceName(join(config.dataDir, 'instance'), log)
      : newInstanceName()
    const connection = await openPostgres(url, { instance, poolSize: config.databasePoolSize })
    closing.push(() => connection.close())
    await verifyKey(connection, seal)
    const deployment = await deploymentOf(connection)
    // Heartbeats have a connection of their own: an instance whose heartbeat is late counts as
    // dead.
    const beats = await openPostgres(url, { instance, poolSize: 1 })
    closing.push(() => beats.close())
    const cluster = new PostgresCluster(beats, {
      instance,
      hostBound,
      hostGraceMs: config.hostGraceMs,
    })
    await cluster.beat()
    const session = new PostgresSession(() => newClient(url, instance), log)
    closing.push(() => session.close())
    const tasks = new SqlTaskStore(connection, seal, { instance, isShared: true })
    return {
      instance,
      deployment,
      tasks,
      close,
      deliveries: new SqlDeliveryStore(connection, tasks),
      statistics: new SqlStatistics(connection),
      shared: {
        cluster,
        now: cluster.now,
        hints: session,
        listen: (hear) => session.listen(hear),
        leads: () => session.leads(),
      },
    }
  } catch (err) {
    await close()
    throw err
  }
}
