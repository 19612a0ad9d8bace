/** The job of a slot shell: the shell commands that run one task. */
import { join } from 'node:path'
import type { WorkerSpec } from '../../core/ports.ts'
import { quote } from '../quote.ts'
import { preparationFiles } from '../repositories.ts'
import { localEnvironment } from './environment.ts'
import { TASK_RUNNER_FOLDER } from './processes.ts'

/** Descriptor of the output pipe in a slot shell. */
export const SLOT_PIPE = 3
/**
 * Silences advice that tasks cannot follow: a worker's package.json names no type on purpose, so
 * that Node detects it for each file.
 */
const NODE_OPTION = '--disable-warning=MODULE_TYPELESS_PACKAGE_JSON'

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
  /** Repositories or a startup script come before the task. */
  needsPreparing: boolean
}

/**
 * Returns one compound command: a shell that reads only a part of it, because the service died
 * while writing, runs nothing. The environment applies to the task's command alone.
 */
export function jobText(job: Job, interpreters: Interpreters, bootstrap: string): string {
  const folder = quote(job.folder)
  const file = quote(`./${job.taskFileName}`)
  const { python, shell, node } = interpreters
  const commands = `${quote(python)} ${quote(shell)} ${quote(node)}`
  const environment = Object.entries(job.environment)
    .map(([name, value]) => `${name}=${quote(value)} `)
    .join('')
  // Opens the pipe again, for writing only.
  const redirects = `</dev/null >/proc/self/fd/${SLOT_PIPE} 2>&1 ${SLOT_PIPE}>&-`
  const command = job.needsPreparing
    ? `/bin/sh ${quote(bootstrap)} run ${folder} ${quote(job.taskFolder)} ${quote(job.taskFileName)} ${commands} ${NODE_OPTION}`
    : `"$__tr_interpreter" $__tr_options ${file}`
  const path = quote(job.environment.PATH ?? '')
  const chooseInterpreter = [
    `choose_interpreter ${file} ${commands} ${path} ${NODE_OPTION}`,
    `[ -z "$__tr_notes" ] || printf %s "$__tr_notes" ${redirects}`,
  ].join('\n')
  // A link or a FIFO that the task put there is neither followed nor waited for: the task counts as
  // lost.
  const isWritable = `[ ! -h ${folder} ] && [ ! -h ${folder}/exit ] && { [ -f ${folder}/exit ] || [ ! -e ${folder}/exit ]; }`
  // The bootstrap may have recorded why the task did not run.
  const unlessRecorded = job.needsPreparing ? `read_exit ${folder} || ` : ''
  const writeExit = `${unlessRecorded}write_exit ${folder} task "$__tr_code"`
  return [
    '{',
    `cd ${folder}/tasks && echo begun 1<>${folder}/exit && {`,
    ...(job.needsPreparing ? [] : [chooseInterpreter]),
    `${environment}${command} ${redirects}`,
    '__tr_code=$?',
    'restore_splitting',
    `${isWritable} && { ${writeExit}; }`,
    '}',
    'cd /',
    // Reports the end of a task that could not begin, too. PIPE is ignored only here: the task must
    // not inherit that.
    `trap '' PIPE; echo ${quote(job.name)}; trap - PIPE`,
    '}',
    '',
  ].join('\n')
}

/** Returns the job for the task of `spec`. `tmp`: a short path to the worker's `tmp` folder. */
export function jobOf(
  spec: WorkerSpec,
  {
    folder,
    tmp,
    settings: { environment, interpreters, bootstrap },
  }: {
    folder: string
    tmp: string
    settings: { environment: Record<string, string>; interpreters: Interpreters; bootstrap: string }
  },
): string {
  const { name, taskFolder, taskFileName } = spec
  const places = { home: join(folder, 'home'), tmp }
  const isRoot = process.getuid?.() === 0
  const job: Job = {
    name,
    folder,
    taskFolder,
    taskFileName,
    needsPreparing: preparationFiles(spec).length > 0,
    environment: {
      ...localEnvironment(environment, places, isRoot),
      ...spec.environment,
      [TASK_RUNNER_FOLDER]: folder,
    },
  }
  return jobText(job, interpreters, bootstrap)
}
