import { describe, expect, test } from 'vitest'
import { directoryOf } from '../../src/core/worker-config.ts'
import { fromGitConfig, gitConfigSchema } from '../../src/wire/git-config.ts'

function parse(config: object) {
  return fromGitConfig(gitConfigSchema.parse(config))
}

function messagesOf(config: object): string[] {
  return gitConfigSchema.safeParse(config).error?.issues.map(({ message }) => message) ?? []
}

describe('remote_url', () => {
  test.each([
    ['git@github.com:example/repo.git', 'ssh://git@github.com/example/repo.git'],
    ['git@github.com:/example/repo.git', 'ssh://git@github.com/example/repo.git'],
    ['deploy@Git.Example.com:repo', 'ssh://deploy@Git.Example.com/repo'],
    ['git@10.0.0.5:22/repo.git', 'ssh://git@10.0.0.5/22/repo.git'],
    ['git@[::1]:team/repo.git', 'ssh://git@[::1]/team/repo.git'],
    ['ssh://git@host:2222/a.git', 'ssh://git@host:2222/a.git'],
  ])('%s is ssh', (remote_url, remoteUrl) => {
    expect(parse({ remote_url })).toEqual({ remoteUrl })
  })

  test.each([
    'github.com:example/repo.git',
    'git@host:',
    'git@host:..',
    'git@ho st:repo.git',
    'git@-oProxyCommand=id:repo.git',
    'git@host\\evil:repo.git',
    'git:password@host:repo.git',
    'a/git@host:repo.git',
    'git@host:repo.git?a=b',
  ])('%s is refused, in one message', (remote_url) => {
    expect(messagesOf({ remote_url })).toHaveLength(1)
  })

  test('a scp-like one is ssh to the other fields as well', () => {
    const remote_url = 'git@github.com:example/repo.git'
    for (const field of [{ username: 'a' }, { save_secret: true, secret_name: 'key' }]) {
      expect(messagesOf({ remote_url, ...field })).toEqual(['is for http(s) repositories'])
    }
    expect(messagesOf({ remote_url, save_secret: true })).toHaveLength(1)
  })
})

describe('local_path', () => {
  test.each([
    ['~/code/one', 'code/one'],
    ['code/one/', 'code/one'],
    ['/home/ubuntu/my/projects/one', 'my/projects/one'],
    ['/home/ubuntu//./one', 'one'],
    [undefined, 'projects/repo'],
  ])('%s is %s below the home', (local_path, directory) => {
    const config = parse({ remote_url: 'https://host/team/repo.git', local_path })
    expect(directoryOf(config)).toBe(directory)
  })

  test.each([
    '/home/ubuntu',
    '/home/ubuntu/',
    '/home/ubuntu2/one',
    '/home/ubuntu/../one',
    '/home/other/one',
    '~/practicus/task',
    '/home/ubuntu/practicus/./task/one',
  ])('%s is refused, in one message', (local_path) => {
    expect(messagesOf({ remote_url: 'https://host/repo.git', local_path })).toHaveLength(1)
  })
})
