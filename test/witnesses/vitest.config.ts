import { defineConfig } from 'vitest/config'

/** `.ci/witnesses`: the service before real clients, which that script installs. */
export default defineConfig({
  cacheDir: '../../node_modules/.vite',
  test: {
    root: new URL('.', import.meta.url).pathname,
    include: ['**/*.test.ts'],
    testTimeout: 600_000,
    hookTimeout: 60_000,
    expect: { poll: { timeout: 20_000 } },
    // One after the other: each is as quick as the machine.
    fileParallelism: false,
  },
})
