import { defineConfig } from 'vite'

export default defineConfig({
  root: import.meta.dirname,
  // Relative, so that the page works below any BASE_PATH.
  base: './',
  cacheDir: '../node_modules/.vite-web',
  build: {
    outDir: '../dist/web',
    emptyOutDir: true,
    target: 'es2024',
    cssTarget: 'chrome123',
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
  },
})
