/** The text that makes a slot shell run one task. Pure. */
import type { WorkerSpec } from '../../core/ports.ts'
import { quote } from '../quote.ts'

export interface Interpreters {
  python: string
  shell: string
  node: string
}

export interface Job {
  name: string
  /** The worker's folder. */
  folder: string
  taskFolder: WorkerSpec['taskFolder']
  taskFileName: string
  environment: Record<string, string>
  /** There is something to do before the task. */
  needsPreparing: boolean
}

/**
 * One compound command: a shell that sees only a part of it, because the service died while writing, runs
 * nothing. The environment stands in front of the one command it is for, and holds for that command alone.
 */
export function jobText(job: Job, interpreters: Interpreters, bootstrap: string): string {
  const folder = quote(job.folder)
  const file = quote(job.taskFileName)
  const { python, shell, node } = interpreters
  const commands = `${quote(python)} ${quote(shell)} ${quote(node)}`
  const environment = Object.entries(job.environment)
    .map(([name, value]) => `${name}=${quote(value)} `)
    .join('')
  const redirects = `</dev/null >>${folder}/log 2>&1`
  const command = job.needsPreparing
    ? `/bin/sh ${quote(bootstrap)} run ${folder} ${quote(job.taskFolder)} ${file} ${commands}`
    : `"$__tr_interpreter" $__tr_option ${quote(`./${job.taskFileName}`)}`
  // What the task made of these is neither followed nor waited for: the service takes it for lost.
  const isWritable = `[ ! -h ${folder} ] && [ ! -h ${folder}/exit ] && { [ -f ${folder}/exit ] || [ ! -e ${folder}/exit ]; }`
  // The bootstrap has written why a task did not run.
  const isTold = job.needsPreparing ? `told ${folder} || ` : ''
  const finish = `${isTold}finish ${folder} task "$__tr_code"`
  return [
    '{',
    `cd ${folder}/tasks && echo begun 1<>${folder}/exit && {`,
    `choose_interpreter ${file} ${commands}`,
    `${environment}${command} ${redirects}`,
    '__tr_code=$?',
    `${isWritable} && { ${finish}; }`,
    '}',
    'cd /',
    // Told also when the task could not begin. Ignoring PIPE only here: the task must not inherit it.
    `trap '' PIPE; echo ${quote(job.name)}; trap - PIPE`,
    '}',
    '',
  ].join('\n')
}
