/** Runs a task with what openapi-typescript made in api.d.ts, and prints what came of it. */
import createClient from 'openapi-fetch'
import type { paths } from './api.js'

const [url = '', token = ''] = process.argv.slice(2)
const client = createClient<paths>({
  baseUrl: url,
  headers: { authorization: `Bearer ${token}` },
})
const accepted = await client.POST('/task-runner', {
  body: {
    task_id: 'typescript',
    task_file_name: 'parameters.sh',
    worker_config: {
      env_variables: { MY_FIRST_PARAM: 'from TypeScript', MY_SECOND_PARAM: 123 },
    },
  },
})
const refused = await client.POST('/task-runner', {
  body: { task_id: 'refused', task_file_name: 'nothere.sh', worker_config: {} },
})
const path = { task_id: 'typescript' }
for (;;) {
  const { data: task } = await client.GET('/tasks/{task_id}', { params: { path } })
  if (task?.status === 'succeeded' || task?.status === 'failed') {
    const { data: log } = await client.GET('/tasks/{task_id}/logs', {
      params: { path },
      parseAs: 'text',
    })
    const result = {
      message: accepted.data?.message,
      status: task.status,
      exit_code: task.exit_code,
      log,
      refused: [refused.response.status, refused.error?.code],
    }
    console.log(JSON.stringify(result))
    break
  }
  await new Promise((resolve) => setTimeout(resolve, 50))
}
