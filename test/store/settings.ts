/** What a database says about itself. Each adapter's test calls this. */
import { afterEach, describe, expect, test } from 'vitest'
import { Sealer } from '../../src/secrets/sealing.ts'
import type { Connection } from '../../src/store/connection.ts'
import { deploymentOf, verifyKey } from '../../src/store/settings.ts'
import { damage, newTask, SEALER, storesOver } from './contract.ts'

const OTHER = new Sealer(Buffer.alloc(32, 8))
const MESSAGE = 'the stored tasks were encrypted with another SEALING_KEY'

/**
 * A database under a name, an empty one the first time; opened as often at once as its kind allows.
 */
export interface Databases {
  open(name: string): Promise<Connection>
  /** Nobody has either of them open. */
  copy(from: string, to: string): Promise<void>
  /** Connections of one database at once; one may be all of them. */
  openFive(name: string): Promise<Connection[]>
}

export function describeSettings(kind: string, databases: Databases): void {
  describe(`the settings of a database, on ${kind}`, () => {
    const opened: Connection[] = []
    let names = 0

    const newName = () => {
      names += 1
      return `settings_${names}`
    }
    const closeAll = async () => {
      for (const connection of new Set(opened.splice(0))) await connection.close()
    }
    afterEach(closeAll)

    async function open(name: string): Promise<Connection> {
      const connection = await databases.open(name)
      opened.push(connection)
      return connection
    }

    async function openFive(name: string): Promise<Connection[]> {
      const connections = await databases.openFive(name)
      opened.push(...connections)
      return connections
    }

    /** As a start does, which ends. */
    async function deployment(name: string): Promise<string> {
      const id = await deploymentOf(await open(name))
      await closeAll()
      return id
    }

    /** As the release before left it. */
    async function beforeTheWord(): Promise<{ connection: Connection; taskId: string }> {
      const connection = await open(newName())
      const task = newTask()
      await storesOver(connection).store.insert(task)
      return { connection, taskId: task.taskId }
    }

    test('the key of the first start is that of an empty database; another is refused', async () => {
      const connection = await open(newName())
      await verifyKey(connection, SEALER)
      await verifyKey(connection, SEALER)
      await expect(verifyKey(connection, OTHER)).rejects.toThrow(MESSAGE)
      await verifyKey(connection, SEALER)
    })

    test('of five first starts at once, those with the key of the first go on', async () => {
      const keys = [SEALER, OTHER, SEALER, OTHER, SEALER]
      const connections = await openFive(newName())
      const starts = await Promise.allSettled(
        connections.map((connection, index) => verifyKey(connection, keys[index] ?? SEALER)),
      )
      const outcomeOf = (key: Sealer) =>
        new Set(starts.flatMap(({ status }, index) => (keys[index] === key ? [status] : [])))
      const outcomes = [outcomeOf(SEALER), outcomeOf(OTHER)]
      expect(outcomes).toContainEqual(new Set(['fulfilled']))
      expect(outcomes).toContainEqual(new Set(['rejected']))
    })

    test('a first start that was overtaken by another goes by the key of that one', async () => {
      const connection = await open(newName())
      const late = held(connection)
      const overtaken = verifyKey(late.connection, OTHER)
      await late.asked
      await verifyKey(connection, SEALER)
      late.release()
      await expect(overtaken).rejects.toThrow(MESSAGE)
      await verifyKey(connection, SEALER)
    })

    test('a database of the release before takes the key of its newest task, and no other', async () => {
      const { connection } = await beforeTheWord()
      await expect(verifyKey(connection, OTHER)).rejects.toThrow(MESSAGE)
      await verifyKey(connection, SEALER)
      await connection.db.deleteFrom('tasks').execute()
      await expect(verifyKey(connection, OTHER)).rejects.toThrow(MESSAGE)
      await verifyKey(connection, SEALER)
    })

    test('a task that is damaged keeps no service from starting', async () => {
      const { connection, taskId } = await beforeTheWord()
      await verifyKey(connection, SEALER)
      await damage(connection, taskId)
      await verifyKey(connection, SEALER)
      await expect(verifyKey(connection, OTHER)).rejects.toThrow(MESSAGE)
    })

    test('the id of a deployment stays the same, and is that of no other database', async () => {
      const name = newName()
      const id = await deployment(name)
      expect(id).toMatch(/^[0-9a-f]{16}$/)
      expect(await deployment(name)).toBe(id)
      expect(await deployment(newName())).not.toBe(id)
    })

    test('five first starts at once agree on the id', async () => {
      const ids = await Promise.all((await openFive(newName())).map(deploymentOf))
      expect(new Set(ids).size).toBe(1)
    })

    test('a start that was overtaken by another takes the id that the other has made', async () => {
      const [original, copy] = [newName(), newName()]
      for (const name of [original, copy]) {
        const connection = await open(name)
        const late = held(connection)
        const overtaken = deploymentOf(late.connection)
        await late.asked
        const id = await deploymentOf(connection)
        late.release()
        expect(await overtaken).toBe(id)
        expect(await deploymentOf(connection)).toBe(id)
        await closeAll()
        if (name === original) await databases.copy(original, copy)
      }
    })

    test('a copy has an id of its own, which all that start on it agree on; the original keeps its own', async () => {
      const [original, copy] = [newName(), newName()]
      const id = await deployment(original)
      await databases.copy(original, copy)
      const ids = new Set(await Promise.all((await openFive(copy)).map(deploymentOf)))
      expect(ids.size).toBe(1)
      const [copied] = ids
      expect(copied).toMatch(/^[0-9a-f]{16}$/)
      expect(copied).not.toBe(id)
      await closeAll()
      expect(await deployment(copy)).toBe(copied)
      expect(await deployment(original)).toBe(id)
    })
  })
}

/** The connection, whose first answer comes only after `release`. */
function held(connection: Connection) {
  const asked = Promise.withResolvers<void>()
  const released = Promise.withResolvers<void>()
  const db = connection.db.withPlugin({
    transformQuery: ({ node }) => node,
    async transformResult({ result }) {
      asked.resolve()
      await released.promise
      return result
    },
  })
  return { connection: { ...connection, db }, asked: asked.promise, release: released.resolve }
}
