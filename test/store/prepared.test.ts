import {
  DummyDriver,
  Kysely,
  SqliteAdapter,
  SqliteIntrospector,
  SqliteQueryCompiler,
  sql,
} from 'kysely'
import { expect, test } from 'vitest'
import { prepared } from '../../src/store/prepared.ts'

const db = new Kysely<{ notes: { id: string; words: string | null; count: number } }>({
  dialect: {
    createAdapter: () => new SqliteAdapter(),
    createDriver: () => new DummyDriver(),
    createIntrospector: (of) => new SqliteIntrospector(of),
    createQueryCompiler: () => new SqliteQueryCompiler(),
  },
})

test('a prepared statement is what Kysely makes of it with the same values, each time', () => {
  const build = (p: { id: string; words: string | null; count: number }) =>
    db
      .updateTable('notes')
      .set({ words: p.words, count: sql<number>`coalesce(${p.count}, count)` })
      .where('id', '=', p.id)
      .where('words', '=', 'a constant')
      .where((eb) => eb.or([eb('count', '=', p.count), eb('count', 'in', [1, 2])]))
      .returning('id')
  const statement = prepared(build)
  for (const values of [
    { id: 'a', words: 'first', count: 1 },
    { id: 'b', words: null, count: 0 },
  ]) {
    const { sql: text, parameters } = build(values).compile()
    expect(statement(values).compile()).toMatchObject({ sql: text, parameters })
  }
})

test('its text is made once, at its first use', () => {
  let made = 0
  const statement = prepared((p: { id: string }) => {
    made += 1
    return db.deleteFrom('notes').where('id', '=', p.id)
  })
  expect(made).toBe(0)
  for (const id of ['a', 'b']) expect(statement({ id }).compile().parameters).toEqual([id])
  expect(made).toBe(1)
})

test('inserts have their values in the order of the columns, whatever the order they are given in', () => {
  const insert = prepared((p: { id: string; words: string; count: number }) =>
    db.insertInto('notes').values({ id: p.id, words: p.words, count: p.count }),
  )
  expect(insert({ count: 3, words: 'w', id: 'i' }).compile().parameters).toEqual(['i', 'w', 3])
})
