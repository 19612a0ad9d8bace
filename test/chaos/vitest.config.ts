import { defineConfig } from 'vitest/config'

/** `npm run test:chaos`: CHAOS_SECONDS (60) and CHAOS_SEED set its length and repeat a run. */
export default defineConfig({
  cacheDir: '../../node_modules/.vite',
  test: { root: new URL('.', import.meta.url).pathname, include: ['**/*.test.ts'] },
})
