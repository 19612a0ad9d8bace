import { defineConfig } from 'vitest/config'

/**
 * `npm run test:chaos`: what takes minutes. CHAOS_SECONDS (60) and CHAOS_SEED set the length of the random kills and
 * repeat a run.
 */
export default defineConfig({
  cacheDir: '../../node_modules/.vite',
  test: {
    root: new URL('.', import.meta.url).pathname,
    include: ['**/*.test.ts'],
    globalSetup: ['../helpers/build.ts'],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // Other processes may take long to answer on a busy machine.
    expect: { poll: { timeout: 10_000 } },
    // One after the other: each wants the machine for itself.
    fileParallelism: false,
  },
})
