import { describe, expect, test } from 'vitest'
import { parseJson } from '../../src/wire/json.ts'

const parsed = (text: string) => parseJson(Buffer.from(text))

describe('numbers', () => {
  test.each(['-5583448197421322993664', '4.976599521999943e+16', '1.0', '1E5'])(
    '%s alone is a number, not an object',
    (text) => {
      expect(parsed(text)).toBe(Number(text))
      expect(parsed(`[${text}]`)).toEqual([Number(text)])
      expect(parsed(`{"": {"": ${text}}}`)).toEqual({ '': { '': Number(text) } })
    },
  )
})

test.each(['{"__proto__": 1}', '{"a": [{"\\u005f_proto__": {}}]}'])(
  '%s is refused by the name that may not be there',
  (text) => {
    expect(() => parsed(text)).toThrow(new SyntaxError('must not have a field named __proto__'))
  },
)
