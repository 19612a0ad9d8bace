import { execFileSync } from 'node:child_process'
import { missing } from './programs.ts'

/** Builds the package once, before all tests, some of which use it as it is installed. Says what will be skipped. */
export default function setup(): void {
  const cwd = new URL('../..', import.meta.url)
  execFileSync('npm', ['run', '--silent', 'build'], { cwd, stdio: 'inherit' })
  for (const name of missing()) console.log(`Tests that need ${name} are skipped: it is not here.`)
}
