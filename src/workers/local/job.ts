/** The text that makes a slot shell run one task. Pure. */

/**
 * A word of a POSIX shell that means exactly `value`, byte for byte (XCU 2.2.2: nothing is special between
 * single quotes). `value` must not contain NUL.
 */
export function quote(value: string): string {
  return `'${value.replaceAll("'", `'\\''`)}'`
}

export interface Interpreters {
  python: string
  shell: string
  node: string
}

export interface Job {
  name: string
  /** The worker's folder. */
  folder: string
  taskFileName: string
  environment: Record<string, string>
  hasStartupScript: boolean
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
  const command = job.hasStartupScript
    ? `/bin/sh ${quote(bootstrap)} run ${folder} ${file} ${commands}`
    : `"$__tr_interpreter" $__tr_option ${quote(`./${job.taskFileName}`)}`
  return [
    '{',
    `cd ${folder}/tasks && echo yes 1<>${folder}/started && {`,
    `choose_interpreter ${file} ${commands}`,
    `${environment}${command} ${redirects}`,
    `finish ${folder} task $?`,
    '}',
    'cd /',
    // Told also when the task could not begin. Ignoring PIPE only here: the task must not inherit it.
    `trap '' PIPE; echo ${quote(job.name)}; trap - PIPE`,
    '}',
    '',
  ].join('\n')
}
