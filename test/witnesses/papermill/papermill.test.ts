import { test } from 'vitest'
import { installed, outputOf } from '../clients.ts'

test('notebooks succeed and fail in the real papermill', async () => {
  const script = new URL('papermill.sh', import.meta.url).pathname
  console.log(await outputOf(script, [installed('papermill/venv/bin/python')]))
})
