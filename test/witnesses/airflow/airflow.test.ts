import { test } from 'vitest'
import { installed, outputOf } from '../clients.ts'

// airflow.py has the cases, and prints a line for each.
test.each(['airflow-3', 'airflow-2'])('the example DAG, in %s', async (name) => {
  const script = new URL('airflow.py', import.meta.url).pathname
  console.log(await outputOf(installed(`airflow/${name}/venv/bin/python`), [script]))
})
