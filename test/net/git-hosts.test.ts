import { describe, expect, test } from 'vitest'
import { WorkerError } from '../../src/core/ports.ts'
import { AddressGuard } from '../../src/net/address-guard.ts'
import { GuardedGitHosts } from '../../src/net/git-hosts.ts'

const URL_ = new URL('https://git.example/project.git')

/** A resolver that answers with an address, or fails with a code. */
function hosts(answer: { address: string } | { code: string }, allowed: string[] = []) {
  const guard = new AddressGuard(allowed, {
    lookup: (_name, _options, done) => {
      if ('address' in answer) done(null, [{ address: answer.address, family: 4 }])
      else done(Object.assign(new Error(`getaddrinfo ${answer.code}`), answer), [])
    },
  })
  return new GuardedGitHosts(guard)
}

const errorOf = (asked: Promise<unknown>) =>
  asked.then(
    () => undefined,
    (err: unknown) => err,
  )

describe('the addresses of a git host', () => {
  test('are what its name was found to be', async () => {
    expect(await hosts({ address: '93.184.216.34' }).addresses(URL_)).toEqual(['93.184.216.34'])
  })

  test.each([
    ...['EAI_AGAIN', 'EAI_FAIL', 'EAI_MEMORY', 'EAI_SYSTEM', 'ETIMEOUT', 'ETIMEDOUT'],
    ...['ESERVFAIL', 'ECONNREFUSED', 'EMFILE', 'ENETUNREACH', 'EANYTHING'],
  ])('%s: the task waits, which is no outcome of it', async (code) => {
    const error = await errorOf(hosts({ code }).addresses(URL_))
    expect(error).toBeInstanceOf(Error)
    expect(error).not.toBeInstanceOf(WorkerError)
    expect(error).toMatchObject({
      message: `The git host "git.example" cannot be resolved at the moment (${code})`,
      cause: { code },
    })
  })

  test.each(['ENOTFOUND', 'ENODATA', 'EINVAL'])('%s: there is no such host', async (code) => {
    const error = await errorOf(hosts({ code }).addresses(URL_))
    expect(error).toBeInstanceOf(WorkerError)
    expect(error).toMatchObject({
      reason: 'startup_failed',
      message: `The git host "git.example" was not found (${code})`,
    })
  })

  test('that may not be dialled end the task, unless the operator allows them', async () => {
    const error = await errorOf(hosts({ address: '10.0.0.5' }).addresses(URL_))
    expect(error).toBeInstanceOf(WorkerError)
    expect(error).toMatchObject({
      reason: 'startup_failed',
      message: expect.stringContaining('GIT_ALLOWED_NETWORKS'),
    })
    const allowed = hosts({ address: '10.0.0.5' }, ['private'])
    expect(await allowed.addresses(URL_)).toEqual(['10.0.0.5'])
  })
})
