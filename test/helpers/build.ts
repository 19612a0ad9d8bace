import { execFileSync } from 'node:child_process'

/** Once, before all tests: some use the package as it is installed. */
export default function setup(): void {
  const cwd = new URL('../..', import.meta.url)
  execFileSync('npm', ['run', '--silent', 'build'], { cwd, stdio: 'inherit' })
}
