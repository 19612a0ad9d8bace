import type { AddressInfo } from 'node:net'
import { expect, test } from 'vitest'
import type { Ports } from '../../src/app.ts'
import type { WorkerBackend } from '../../src/core/ports.ts'
import { startApp, taskRequest } from '../helpers/app.ts'

/** Workers that, once `isArmed`, are terminated by somebody else between being found and being asked for their log. */
function goneWhenAsked(ports: Ports, isArmed: () => boolean): Ports {
  const find: WorkerBackend['find'] = async (name) => {
    const found = await ports.backend.find(name)
    if (isArmed()) await found?.terminate()
    return found
  }
  const backend = new Proxy(ports.backend, {
    get(target, name) {
      if (name === 'find') return find
      const value = Reflect.get(target, name, target)
      return typeof value === 'function' ? value.bind(target) : value
    },
  })
  return { ...ports, backend }
}

test('a reader whose task ends, and whose worker goes, between two looks gets the whole log and the end', async () => {
  let isArmed = false
  await using app = await startApp(
    {},
    { wrapPorts: (ports) => goneWhenAsked(ports, () => isArmed) },
  )
  await app.http.listen({ host: '127.0.0.1', port: 0 })
  const { port } = app.http.server.address() as AddressInfo
  const request = taskRequest({ terminate_on_completion: false })
  await app.submit(request)
  await app.finished(request.task_id)
  isArmed = true
  const url = `http://127.0.0.1:${port}/tasks/${request.task_id}/logs?follow=true`
  const events = await (await fetch(url)).text()
  expect(events).toContain('data: hi\n')
  expect(events).toContain('event: end\ndata: {"status":"succeeded","reason":"completed"}\n')
})
