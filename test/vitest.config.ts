import { defineConfig } from 'vitest/config'

/** Suites that start browsers, interpreters and many services; `npm run test:slow` runs them. */
export const SLOW = [
  'callbacks/hostile-receivers.test.ts',
  'cli.test.ts',
  'client/client.test.ts',
  'conformance/**/*.test.ts',
  'examples/**/*.test.ts',
  'package.test.ts',
  'readme.test.ts',
  'recovery/**/*.test.ts',
  'routes/slow-readers.test.ts',
  'security/secrets.test.ts',
  'web/docs.test.ts',
  'web/page.test.ts',
  'workers/bootstrap-contain.test.ts',
  'workers/docker.test.ts',
  'workers/docker-containers.test.ts',
  'workers/docker-failures.test.ts',
  'workers/docker-restart.test.ts',
  'workers/kubernetes-failures.test.ts',
  'workers/kubernetes-streams.test.ts',
  'workers/kubernetes-troubles.test.ts',
  'workers/local-log.test.ts',
  'workers/local-odd-folders.test.ts',
]

export default defineConfig({
  cacheDir: '../node_modules/.vite',
  test: {
    root: new URL('.', import.meta.url).pathname,
    include: ['**/*.test.ts'],
    exclude: ['chaos/**', 'witnesses/**', ...SLOW],
    globalSetup: ['helpers/build.ts'],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // Other processes may take long to answer on a busy machine.
    expect: { poll: { timeout: 10_000 } },
    // The tests start processes: more of them than cores would only make them wait for each other.
    maxWorkers: 2,
    restoreMocks: true,
  },
})
