import { defineConfig } from 'vitest/config'

export default defineConfig({
  cacheDir: '../node_modules/.vite',
  test: {
    root: new URL('.', import.meta.url).pathname,
    include: ['**/*.test.ts'],
    exclude: ['chaos/**'],
    globalSetup: ['helpers/build.ts'],
    testTimeout: 30_000,
    hookTimeout: 30_000,
    // Other processes may take long to answer on a busy machine.
    expect: { poll: { timeout: 10_000 } },
    // The tests start processes: more of them than cores would only make them wait for each other.
    maxWorkers: 2,
    restoreMocks: true,
  },
})
