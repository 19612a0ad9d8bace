import type { AddressInfo } from 'node:net'
import { expect, test } from 'vitest'
import type { Ports } from '../../src/app.ts'
import { startApp, taskRequest } from '../helpers/app.ts'

/** Workers that are terminated by somebody else between being found and being asked for their log. */
function goneWhenAsked(ports: Ports): Ports {
  const { backend } = ports
  let isArmed = false
  return {
    ...ports,
    backend: new Proxy(backend, {
      get(target, name) {
        if (name === 'arm') return () => void (isArmed = true)
        const value = Reflect.get(target, name, target)
        if (name !== 'find') return typeof value === 'function' ? value.bind(target) : value
        return async (worker: string) => {
          const found = await target.find(worker)
          if (found && isArmed) await found.terminate()
          return found
        }
      },
    }),
  }
}

test('a reader whose task ends, and whose worker goes, between two looks gets the whole log and the end', async () => {
  let arm = () => {}
  await using app = await startApp(
    {},
    {
      wrapPorts: (ports) => {
        const wrapped = goneWhenAsked(ports)
        arm = () => (wrapped.backend as unknown as { arm(): void }).arm()
        return wrapped
      },
    },
  )
  await app.http.listen({ host: '127.0.0.1', port: 0 })
  const { port } = app.http.server.address() as AddressInfo
  const request = taskRequest({ terminate_on_completion: false })
  await app.submit(request)
  await app.finished(request.task_id)
  arm()
  const url = `http://127.0.0.1:${port}/tasks/${request.task_id}/logs?follow=true`
  const events = await (await fetch(url)).text()
  expect(events).toContain('data: hi\n')
  expect(events).toContain('event: end\ndata: {"status":"succeeded","reason":"completed"}\n')
})
