/** Repositories on local workers, cloned from a real git server that wants a password. */
import { execFileSync } from 'node:child_process'
import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect } from 'vitest'
import { startApp, type TestApp, taskRequest } from '../helpers/app.ts'
import { type GitServer, startGitServer } from '../helpers/git-server.ts'
import { startRawServer } from '../helpers/hostile-servers.ts'
import { needs } from '../helpers/needs.ts'
import { type Receiver, startReceiver } from '../helpers/receiver.ts'

const test = needs('git')

const TOKEN = 'canary git/token:with@odd?characters%20'
const CREDENTIALS = { username: 'x-access-token', password: TOKEN }
/** Prints the task's files and folders, so that a test sees what was cloned. */
const LIST = 'cd ~ && find . -path ./.ssh -prune -o -name .git -prune -o -type f -print | sort'

let git: GitServer
let receiver: Receiver
let app: TestApp

beforeAll(async () => {
  git = await startGitServer(CREDENTIALS)
  git.create('public', {
    'README.md': 'public\n',
    'jobs/hello.py':
      'import os, sys\nprint("the task is in", os.path.realpath(os.path.expanduser("~/practicus/task")).split("/")[-1])\nprint("hello from", os.getcwd().split("/")[-1], sys.argv[0])\n',
    'jobs/code.sh': 'exit 7\n',
    'other/data.txt': 'data\n',
    'release:jobs/release.txt': 'only on the release branch\n',
  })
  git.create('headless', { 'README.md': '' })
  git.git('headless', 'symbolic-ref', 'HEAD', 'refs/heads/gone')
  git.git('public', 'tag', 'v1', 'release')
  git.git('public', 'update-ref', 'refs/pull/1/head', 'release')
  git.create('old/public', { 'README.md': 'public\n', 'jobs/a': '', 'other/b': '' })
  git.create('private/secret', { 'secret.txt': 'private content\n' })
  receiver = await startReceiver()
  app = await startApp({ SECRET_GIT_SECRET: TOKEN, SECRET_WRONG: 'canary-wrong-git-token' })
})
afterAll(async () => {
  await app[Symbol.asyncDispose]()
  await receiver[Symbol.asyncDispose]()
  await git[Symbol.asyncDispose]()
})

/** Runs a task with these repositories, and tells how it ended and what it called back with. */
async function run(gitConfigs: object[], script = LIST, overrides: object = {}) {
  const request = taskRequest({
    task_file_name: 'w-eval.sh',
    worker_config: { git_configs: gitConfigs, env_variables: { SCRIPT: script } },
    callback_url: receiver.url,
    ...overrides,
  })
  expect(await app.submit(request)).toMatchObject({ status: 200 })
  const { body } = await receiver.callbackOf(request.task_id)
  return { task: await app.finished(request.task_id), logs: body.logs, success: body.success }
}

const publicRepository = () => `${git.url}/public.git`
const privateRepository = () => `${git.url}/private/secret.git`

describe('a cloned repository', () => {
  test('lies in ~/projects/<repository>', async () => {
    const { task, logs } = await run([{ remote_url: publicRepository() }])
    expect(task).toMatchObject({ status: 'succeeded' })
    expect(logs).toContain(`[task-runner] cloning ${publicRepository()} into ~/projects/public\n`)
    expect(logs).toContain('./projects/public/README.md\n./projects/public/jobs/code.sh\n')
  })

  test('of several, each lies where its local_path says', async () => {
    const { logs } = await run([
      { remote_url: publicRepository(), local_path: '~/code/one' },
      { remote_url: publicRepository(), local_path: 'two', save_secret: false },
    ])
    expect(logs).toContain('./code/one/README.md\n')
    expect(logs).toContain('./two/README.md\n')
  })

  test('lies in ~/projects when its local_path names the projects of Practicus AI', async () => {
    const { logs } = await run(
      [
        { remote_url: publicRepository(), local_path: '/home/ubuntu/my/projects/one' },
        { remote_url: publicRepository(), local_path: '~/my/projects/two' },
      ],
      'cat ~/projects/one/README.md ~/my/projects/one/README.md ~/projects/two/README.md',
    )
    expect(logs).toContain('public\npublic\npublic\n')
  })

  test('has the branch that was asked for', async () => {
    const { logs } = await run(
      [{ remote_url: publicRepository(), branch: 'release' }],
      'cat ~/projects/public/jobs/release.txt',
    )
    expect(logs).toContain('only on the release branch\n')
  })

  test.each([
    ['a branch', 'release'],
    ['a branch in full', 'refs/heads/release'],
    ['a branch as clones name it', 'origin/release'],
    ['a tag', 'v1'],
    ['a tag in full', 'refs/tags/v1'],
    ['what a host keeps of a proposed change', 'refs/pull/1/head'],
  ])('has what branch names: %s', async (_what, branch) => {
    for (const fields of [{ branch }, { branch, fetch_depth: 1 }]) {
      const { logs } = await run(
        [{ remote_url: publicRepository(), ...fields }],
        'cd ~/projects/public && cat jobs/release.txt && git rev-list --count HEAD',
      )
      expect(logs, JSON.stringify(fields)).toMatch(
        new RegExp(`only on the release branch\n${fields.fetch_depth ?? 5}\n$`),
      )
    }
  })

  test.each(['public', 'old/public'])('has the commit that branch names, of %s', async (name) => {
    const commits = git.git(name, 'rev-list', 'main').trim().split('\n')
    const commit = commits.at(-2) ?? ''
    for (const fields of [{}, { fetch_depth: 1 }, { sparse_checkout_folders: ['jobs'] }]) {
      const { task, logs } = await run(
        [{ remote_url: `${git.url}/${name}.git`, branch: commit, ...fields }],
        'cd ~/projects/public && ls && git rev-parse HEAD',
      )
      expect(task).toMatchObject({ status: 'succeeded' })
      expect(logs, JSON.stringify(fields)).toMatch(new RegExp(`README.md\njobs\n${commit}\n$`))
    }
  })

  test('has as many commits as fetch_depth says', async () => {
    const count = 'git -C ~/projects/public rev-list --count HEAD'
    expect((await run([{ remote_url: publicRepository(), fetch_depth: 2 }], count)).logs).toMatch(
      /^2$/m,
    )
    expect((await run([{ remote_url: publicRepository() }], count)).logs).toMatch(/^4$/m)
  })

  test('has only the folders of sparse_checkout_folders, and the files at the top', async () => {
    const { logs } = await run([
      { remote_url: publicRepository(), sparse_checkout_folders: ['other'] },
    ])
    expect(logs).toContain('./projects/public/README.md\n./projects/public/other/data.txt\n')
    expect(logs).not.toContain('jobs/')
  })
})

describe('a private repository', () => {
  test('with save_secret: false is cloned with the secret as password, which then is nowhere on the worker', async () => {
    const everything =
      'cat ~/projects/secret/secret.txt; git -C ~/projects/secret config --list; ls -a ~ $HOME/..; ' +
      'grep -rl --exclude=log -- canary "$HOME/.." || echo nowhere'
    const { task, logs } = await run(
      [{ remote_url: privateRepository(), secret_name: 'git_secret', save_secret: false }],
      everything,
    )
    expect(logs).toContain('private content\n')
    expect(logs).toContain('\nnowhere\n')
    expect(logs).not.toContain('canary')
    expect(task).toMatchObject({ status: 'succeeded' })
  })

  test('is cloned as the given username', async () => {
    await using other = await startGitServer({ username: 'deploy', password: TOKEN })
    other.create('private/secret', { 'secret.txt': 'private content\n' })
    const repository = {
      remote_url: `${other.url}/private/secret.git`,
      secret_name: 'git_secret',
      username: 'deploy',
    }
    const { task } = await run([repository])
    expect(task).toMatchObject({ status: 'succeeded' })
  })

  test.each([undefined, null, true])(
    'with save_secret: %s can be pulled and pushed by the task, and the secret is masked in its log',
    async (save_secret) => {
      const push = [
        'cd ~/projects/secret && git pull --quiet && date +%N > pushed.txt && git add . &&',
        'git -c user.name=a -c user.email=a@b commit --quiet -m pushed && git push --quiet &&',
        'cat ~/.git-credentials; stat -c %a ~/.git-credentials; grep -c canary .git/config',
      ].join(' ')
      const { logs } = await run(
        [{ remote_url: privateRepository(), secret_name: 'git_secret', save_secret }],
        push,
      )
      expect(logs).toContain(
        `http://x-access-token:***@127.0.0.1%3a${git.port}/private/secret.git\n600\n0\n`,
      )
      const bare = join(git.root, 'private/secret.git')
      const pushed = execFileSync('git', ['-C', bare, 'log', '--format=%s', '-1', 'main'])
      expect(pushed.toString()).toBe('pushed\n')
    },
  )

  test('with save_secret: false cannot be pulled by the task', async () => {
    const { logs } = await run(
      [{ remote_url: privateRepository(), secret_name: 'git_secret', save_secret: false }],
      'GIT_TERMINAL_PROMPT=0 git -C ~/projects/secret pull 2>&1; true',
    )
    expect(logs).toContain('could not read Username')
  })

  test('shows its token in no process, answer, or file of the service while it is cloned', async () => {
    const reached = Promise.withResolvers<void>()
    await using slow = await startRawServer(({ received, socket }) => {
      socket.on('data', () => {
        const request = received().toString()
        if (request.includes('Authorization')) reached.resolve()
        else if (request.includes('\r\n\r\n')) {
          const answer = 'WWW-Authenticate: Basic realm="git"\r\nContent-Length: 0\r\n\r\n'
          socket.write(`HTTP/1.1 401 Unauthorized\r\n${answer}`)
        }
      })
    })
    const remote = `http://127.0.0.1:${slow.port}/slow.git`
    const request = taskRequest({
      worker_config: { git_configs: [{ remote_url: remote, secret_name: 'git_secret' }] },
    })
    await app.submit(request)
    await reached.promise
    const pids = (await readdir('/proc')).filter((name) => /^\d+$/.test(name))
    const lines = await Promise.all(
      pids.map((pid) => readFile(`/proc/${pid}/cmdline`, 'latin1').catch(() => '')),
    )
    expect(lines.some((line) => line.includes(remote))).toBe(true)
    expect(lines.filter((line) => line.includes('canary'))).toEqual([])
    expect(JSON.stringify(await app.get(`/tasks/${request.task_id}`))).not.toContain('canary')
    await app.post(`/tasks/${request.task_id}/cancel`)
    expect(await app.finished(request.task_id)).toMatchObject({ status: 'cancelled' })
    const database = join(app.dataDir, 'task-runner.db')
    expect(await readFile(database, 'latin1')).not.toContain('canary git')
    expect(await readFile(`${database}-wal`, 'latin1')).not.toContain('canary git')
  })
})

describe('what git warns of', () => {
  test('is in the log of the task, as with an empty repository, which a task may fill', async () => {
    git.create('private/empty', { a: '' })
    git.git('private/empty', 'update-ref', '-d', 'refs/heads/main')
    const push = [
      'cd ~/projects/empty && ls -A && echo 1 >a && git add . &&',
      'git -c user.name=a -c user.email=a@b commit --quiet -m first && git push --quiet origin HEAD:main',
    ].join(' ')
    for (const fields of [{}, { sparse_checkout_folders: ['a'] }]) {
      const { task, logs } = await run(
        [{ remote_url: `${git.url}/private/empty.git`, secret_name: 'git_secret', ...fields }],
        push,
      )
      expect(logs).toMatch(/^warning: You appear to have cloned an empty repository.\n\.git$/m)
      expect(task).toMatchObject({ status: 'succeeded' })
      expect(git.git('private/empty', 'log', '--format=%s', 'main')).toBe('first\n')
      git.git('private/empty', 'update-ref', '-d', 'refs/heads/main')
    }
  })
})

describe('an ssh repository', () => {
  test('is cloned with the secret as private key, by the address that was judged, and no key is left', async () => {
    const bin = join(app.dataDir, 'bin')
    const seen = join(app.dataDir, 'ssh-arguments')
    // Stands in for ssh(1): keeps what it was given, and runs the command here instead of over there.
    const ssh = [
      '#!/bin/bash',
      `printf '%s\\n' "$@" >${seen}`,
      `while [ $# -gt 1 ]; do case $1 in -i) cat "$2" >>${seen};; esac; shift; done`,
      'exec sh -c "$1"',
    ]
    await mkdir(bin)
    await writeFile(join(bin, 'ssh'), ssh.join('\n'), { mode: 0o700 })
    const key = 'canary-key-line-1\ncanary-key-line-2'
    await using other = await startApp({ PATH: `${bin}:${process.env.PATH}`, SECRET_KEY: key })
    const request = taskRequest({
      task_file_name: 'w-eval.sh',
      worker_config: {
        git_configs: [
          { remote_url: `ssh://git@localhost:2222${git.root}/public.git`, secret_name: 'KEY' },
        ],
        env_variables: {
          SCRIPT: 'ls ~/projects/public; grep -rl canary-key $HOME/.. || echo none',
        },
      },
    })
    await other.submit(request)
    await other.finished(request.task_id)
    const log = await other.text(`/tasks/${request.task_id}/logs`)
    expect(log).toContain('README.md')
    expect(log).toMatch(/none\n$/)
    const args = await readFile(seen, 'utf8')
    expect(args).toContain('\n-p\n2222\n')
    expect(args).toContain('HostKeyAlias=localhost\n')
    expect(args).toMatch(/^HostName=(127\.0\.0\.1|::1)$/m)
    expect(args).toContain('BatchMode=yes\n')
    expect(args.endsWith(`${key}\n`)).toBe(true)
  })
})

describe('a task file of a repository', () => {
  test('runs in the repository, to which ~/practicus/task leads', async () => {
    const { task, logs } = await run([{ remote_url: publicRepository() }], '', {
      task_file_name: 'public/jobs/hello.py',
    })
    expect(logs).toContain('the task is in public\n')
    expect(logs).toMatch(/hello from public \.\/jobs\/hello\.py\n$/)
    expect(task).toMatchObject({ status: 'succeeded', task_file_name: 'public/jobs/hello.py' })
  })

  test('has its exit code told as any other', async () => {
    const { task } = await run([{ remote_url: publicRepository(), local_path: '~/x' }], '', {
      task_file_name: 'public/jobs/code.sh',
    })
    expect(task).toMatchObject({ status: 'failed', reason: 'exit_code', exit_code: 7 })
  })

  test('that is not there fails the task with a clear line', async () => {
    const { task, logs, success } = await run([{ remote_url: publicRepository() }], '', {
      task_file_name: 'public/jobs/nothing.py',
    })
    const message = 'There is no file "jobs/nothing.py" in ~/projects/public'
    expect(task).toMatchObject({ status: 'failed', reason: 'startup_failed', message })
    expect(logs).toContain(`[task-runner] ${message}\n`)
    expect(success).toBe(false)
  })

  test('of a repository that is not cloned is a 404', async () => {
    const request = taskRequest({
      task_file_name: 'other/jobs/hello.py',
      worker_config: { git_configs: [{ remote_url: publicRepository() }] },
    })
    expect(await app.submit(request)).toMatchObject({ status: 404 })
  })
})

describe('a clone that fails ends the task as startup_failed, with git’s own words', () => {
  test.each([
    ['no such repository', () => [{ remote_url: `${git.url}/nothing.git` }], 'not found'],
    [
      'a wrong token',
      () => [{ remote_url: privateRepository(), secret_name: 'wrong' }],
      'Authentication failed',
    ],
    ['no token', () => [{ remote_url: privateRepository() }], 'Authentication failed'],
    [
      'an unknown branch',
      () => [{ remote_url: publicRepository(), branch: 'nope' }],
      'Remote branch nope not found',
    ],
    ['a host that is down', () => [{ remote_url: 'http://127.0.0.1:1/a.git' }], 'onnect'],
    [
      'an unknown commit',
      () => [{ remote_url: publicRepository(), branch: 'a'.repeat(40) }],
      'a'.repeat(40),
    ],
    ['an unknown ref', () => [{ remote_url: publicRepository(), branch: 'refs/a/b' }], 'refs/a/b'],
    ['a place that is taken', () => Array(2).fill({ remote_url: publicRepository() }), 'exists'],
    [
      'a host that redirects',
      () => [{ remote_url: `${git.url}/moved/public.git` }],
      'redirects are not followed',
    ],
  ])('%s', async (_what, configs, words) => {
    const { task, logs, success } = await run(configs())
    expect(task).toMatchObject({
      ...{ status: 'failed', reason: 'startup_failed', exit_code: null },
      message: expect.stringMatching(/^git clone of http.* failed: (fatal|error): .+/),
    })
    expect(task.message).toContain(words)
    expect(logs).toContain(`[task-runner] ${task.message}\n`)
    expect(`${JSON.stringify(task)}${logs}`).not.toContain('canary')
    expect(success).toBe(false)
  })

  test.each([{}, { fetch_depth: 1 }, { sparse_checkout_folders: ['jobs'] }])(
    'a HEAD that names no branch, with %j',
    async (fields) => {
      const { task } = await run([{ remote_url: `${git.url}/headless.git`, ...fields }])
      expect(task).toMatchObject({ status: 'failed', reason: 'startup_failed', exit_code: null })
      expect(task.message).toMatch(
        /^git clone of http.* failed: fatal: remote HEAD refers to nonexistent ref, unable to checkout/,
      )
    },
  )

  test('a host that is slow', async () => {
    await using silent = await startRawServer()
    const { task } = await run([{ remote_url: `http://127.0.0.1:${silent.port}/a.git` }], '', {
      worker_config: {
        git_configs: [{ remote_url: `http://127.0.0.1:${silent.port}/a.git` }],
        env_variables: { GIT_HTTP_LOW_SPEED_TIME: 1 },
      },
    })
    expect(task).toMatchObject({ reason: 'startup_failed' })
    expect(task.message).toContain('Operation too slow')
  })

  test('a host whose name does not exist', async () => {
    // Too long for a name: so says every resolver, also where no name server answers.
    const host = `${'no-such-host'.padEnd(64, '-x')}.invalid`
    const { task, logs } = await run([{ remote_url: `http://${host}/a.git` }])
    expect(task).toMatchObject({ reason: 'startup_failed' })
    expect(task.message).toContain(`"${host}" was not found`)
    expect(logs).toBe(`[task-runner] ${task.message}\n`)
  })
})

describe('which hosts may be asked', () => {
  test('an address that is not allowed is refused at submit', async () => {
    await using strict = await startApp({ GIT_ALLOWED_NETWORKS: 'private' })
    const request = taskRequest({
      worker_config: { git_configs: [{ remote_url: publicRepository() }] },
    })
    expect(await strict.submit(request)).toMatchObject({
      status: 422,
      body: { errors: [{ path: 'worker_config.git_configs.0.remote_url' }] },
    })
    for (const remote_url of ['http://169.254.169.254/a.git', 'ssh://git@[::1]/a.git']) {
      const other = taskRequest({ worker_config: { git_configs: [{ remote_url }] } })
      expect(await strict.submit(other), remote_url).toMatchObject({ status: 422 })
    }
  })
})
