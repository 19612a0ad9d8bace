/** Answers what it is asked; or ends, in one of the ways in which a thread can. */
import { workerData } from 'node:worker_threads'
import { type Call, failed } from '../../src/threads/messages.ts'
import { serve } from '../../src/threads/serving.ts'

if (workerData === 'broken') throw Object.assign(new Error('it cannot start'), { code: 'E_START' })

let batches = 0
const { tell, notify } = serve<string>(
  (calls) => {
    batches += 1
    tell(calls.map(answer))
  },
  () => {},
)

function answer({ id, request }: Call<string>) {
  if (request === 'throw') setImmediate(() => Promise.reject(new Error('a bug')))
  if (request === 'exit') process.exit(3)
  if (request === 'fail') {
    return failed(id, Object.assign(new Error('no'), { code: 'ENO', odd: () => {} }))
  }
  if (request === 'notify') notify('a notice')
  return { id, value: `${request} ${batches}` }
}
