/** The text that makes a slot shell run one task. */
import { join } from 'node:path'
import type { WorkerSpec } from '../../core/ports.ts'
import { quote } from '../quote.ts'
import { repositoryFiles } from '../repositories.ts'
import { localEnvironment } from './environment.ts'
import type { Contents } from './folders.ts'
import { TASK_RUNNER_FOLDER } from './processes.ts'

/** Descriptor of the pipe in a slot shell. */
export const SLOT_PIPE = 3
/** The package.json of a worker's folder names no type on purpose: Node finds it out for each file, and need not advise one. */
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
  /** There is something to do before the task. */
  needsPreparing: boolean
}

/**
 * One compound command: a shell that sees only a part of it, because the service died while writing, runs
 * nothing. The environment stands in front of the one command it is for, and holds for that command alone.
 */
export function jobText(job: Job, interpreters: Interpreters, bootstrap: string): string {
  const folder = quote(job.folder)
  const file = quote(`./${job.taskFileName}`)
  const { python, shell, node } = interpreters
  const commands = `${quote(python)} ${quote(shell)} ${quote(node)}`
  const environment = Object.entries(job.environment)
    .map(([name, value]) => `${name}=${quote(value)} `)
    .join('')
  // Opened anew, for writing alone.
  const redirects = `</dev/null >/proc/self/fd/${SLOT_PIPE} 2>&1 ${SLOT_PIPE}>&-`
  const command = job.needsPreparing
    ? `/bin/sh ${quote(bootstrap)} run ${folder} ${quote(job.taskFolder)} ${quote(job.taskFileName)} ${commands} ${NODE_OPTION}`
    : `"$__tr_interpreter" $__tr_options ${file}`
  const path = quote(job.environment.PATH ?? '')
  const chooseInterpreter = [
    `choose_interpreter ${file} ${commands} ${path} ${NODE_OPTION}`,
    `[ -z "$__tr_notes" ] || printf %s "$__tr_notes" ${redirects}`,
  ].join('\n')
  // What the task made of these is neither followed nor waited for: the service takes it for lost.
  const isWritable = `[ ! -h ${folder} ] && [ ! -h ${folder}/exit ] && { [ -f ${folder}/exit ] || [ ! -e ${folder}/exit ]; }`
  // The bootstrap has written why a task did not run.
  const isTold = job.needsPreparing ? `told ${folder} || ` : ''
  const finish = `${isTold}finish ${folder} task "$__tr_code"`
  return [
    '{',
    `cd ${folder}/tasks && echo begun 1<>${folder}/exit && {`,
    ...(job.needsPreparing ? [] : [chooseInterpreter]),
    `${environment}${command} ${redirects}`,
    '__tr_code=$?',
    'restore_words',
    `${isWritable} && { ${finish}; }`,
    '}',
    'cd /',
    // Told also when the task could not begin. Ignoring PIPE only here: the task must not inherit it.
    `trap '' PIPE; echo ${quote(job.name)}; trap - PIPE`,
    '}',
    '',
  ].join('\n')
}

/** Returns the files that the bootstrap needs in the worker's folder to prepare the task. */
export function filesOf({ startupScript, repositories }: WorkerSpec): Contents['files'] {
  return [
    ...(startupScript === undefined ? [] : [{ name: 'startup.sh', content: startupScript }]),
    ...(repositories.length === 0 ? [] : repositoryFiles(repositories)),
  ]
}

/** Returns the text for the task of `spec` in the worker's folder. `tmp`: a short path to that of the worker. */
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
  const job = {
    ...{ name, folder, taskFolder, taskFileName, needsPreparing: filesOf(spec).length > 0 },
    environment: {
      ...localEnvironment(environment, places, isRoot),
      ...spec.environment,
      [TASK_RUNNER_FOLDER]: folder,
    },
  }
  return jobText(job, interpreters, bootstrap)
}
