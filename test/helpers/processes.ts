import { readdir, readFile } from 'node:fs/promises'

/** Other processes of this machine, in whatever namespace, whose command line or environment holds the word. */
export async function processesWith(wanted: string): Promise<string[]> {
  const pids = (await readdir('/proc')).filter((entry) => /^\d+$/.test(entry))
  const lines = await Promise.all(
    pids.map(async (pid) => {
      const read = (name: string) => readFile(`/proc/${pid}/${name}`, 'latin1').catch(() => '')
      const [command, environment] = await Promise.all([read('cmdline'), read('environ')])
      const isIt = command.includes(wanted) || environment.includes(wanted)
      return isIt && Number(pid) !== process.pid ? [`${pid} ${command}`] : []
    }),
  )
  return lines.flat()
}
