import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { brotliCompress, gzip } from 'node:zlib'
import { defineConfig, type Plugin } from 'vite'

/** Compressed once, here: the service sends these as they are. */
const compressed: Plugin = {
  name: 'compressed',
  async writeBundle({ dir = '' }, bundle) {
    for (const output of Object.values(bundle)) {
      const content = Buffer.from(output.type === 'chunk' ? output.code : output.source)
      const path = join(dir, output.fileName)
      await writeFile(`${path}.br`, await promisify(brotliCompress)(content))
      await writeFile(`${path}.gz`, await promisify(gzip)(content, { level: 9 }))
    }
  },
}

export default defineConfig({
  root: import.meta.dirname,
  // Relative, so that the page works below any BASE_PATH.
  base: './',
  plugins: [compressed],
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
