import { execFileSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmdirSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'vitest'
import { skipReason } from './programs.ts'

export interface SmallDisk extends AsyncDisposable {
  folder: string
  /** Takes all space that is left, to the last byte. */
  fill(): void
  /** Takes all but `left` of the files that can still be made. */
  fillInodes(left: number): void
  /** Gives back what `fill` and `fillInodes` took. */
  free(): void
  remount(mode: 'ro' | 'rw'): void
}

/** A disk of its own, in memory. Skips the test where none can be mounted; in CI that is a failure. */
export function mountSmallDisk(context: TestContext, options: string): SmallDisk {
  const folder = mkdtempSync(join(tmpdir(), 'task-runner-disk-'))
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', options, 'tmpfs', folder], { stdio: 'pipe' })
  } catch (err) {
    rmdirSync(folder)
    const reason = `needs root and tmpfs: ${err instanceof Error ? err.message : err}`
    context.skip(skipReason(reason))
  }
  const fillers: string[] = []
  const filler = () => {
    const path = join(folder, `filler-${fillers.length}`)
    const file = openSync(path, 'w')
    fillers.push(path)
    return file
  }
  return {
    folder,
    fill() {
      const file = filler()
      try {
        for (const bytes of [1 << 20, 4096, 1])
          untilFull(() => writeSync(file, Buffer.alloc(bytes)))
      } finally {
        closeSync(file)
      }
    },
    fillInodes(left) {
      untilFull(() => closeSync(filler()))
      for (const path of fillers.splice(fillers.length - left)) rmSync(path)
    },
    free() {
      for (const path of fillers.splice(0)) rmSync(path)
    },
    remount(mode) {
      execFileSync('mount', ['-o', `remount,${mode}`, folder], { stdio: 'pipe' })
    },
    async [Symbol.asyncDispose]() {
      // Lazily: what still runs in there after a failed test must not keep it mounted.
      execFileSync('umount', ['-l', folder], { stdio: 'pipe' })
      rmdirSync(folder)
    },
  }
}

function untilFull(write: () => void): void {
  for (;;) {
    try {
      write()
    } catch (err) {
      if ((err as NodeJS.ErrnoException).code === 'ENOSPC') return
      throw err
    }
  }
}
