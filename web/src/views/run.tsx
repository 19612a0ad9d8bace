import { useEffect, useState } from 'preact/hooks'
import { ApiError, api, type FieldError, messageOf, type Task } from '../api.ts'
import { ObjectFields } from '../fields.tsx'
import {
  fieldOf,
  filled,
  maskedPaths,
  type ObjectField,
  pathsOf,
  requestOf,
} from '../form-model.ts'
import { Heading } from '../parts.tsx'
import { go, taskHref } from '../route.ts'
import { visible } from '../text.ts'

/** The form of a new task, empty or with the parameters of the task `like`. */
export function RunView({ like }: { like: string | undefined }) {
  const [form, setForm] = useState<ObjectField>()
  const [before, setBefore] = useState<Task>()
  const [problem, setProblem] = useState('')
  useEffect(() => {
    const prepare = async () => {
      const empty = await emptyForm()
      const task = like === undefined ? undefined : await api.task(like)
      setBefore(task)
      const values = task ? { ...task, task_id: nextId(task.task_id) } : { task_id: newId() }
      setForm(filled(empty, values))
    }
    prepare().catch((err: unknown) => setProblem(messageOf(err)))
  }, [like])
  const title = like === undefined ? 'Run a task' : `Run again: ${visible(like)}`
  return (
    <>
      <Heading title={title}>{title}</Heading>
      {problem !== '' && (
        <p role="alert" class="message error">
          {problem}
        </p>
      )}
      {before && form && <Again task={before} isMasked={maskedPaths(form).length > 0} />}
      {form && <Form form={form} setForm={setForm} />}
    </>
  )
}

function Again({ task, isMasked }: { task: Task; isMasked: boolean }) {
  return (
    <div class="card note">
      <p>
        Filled in from the earlier run, including the defaults of its worker files.
        {isMasked &&
          ' Values of variables are hidden: enter them again, or remove a row to use the default.'}
        {task.callback_url !== null &&
          ' The token of the callback is hidden, too: enter it again if there was one.'}
      </p>
    </div>
  )
}

function Form({ form, setForm }: { form: ObjectField; setForm: (form: ObjectField) => void }) {
  const [errors, setErrors] = useState<readonly FieldError[]>([])
  const [message, setMessage] = useState('')
  const [isBusy, setBusy] = useState(false)
  const byPath = new Map(errors.map(({ path, message }) => [path, message]))
  const shown = new Set(pathsOf(form))

  const reject = (why: string, fieldErrors: readonly FieldError[]) => {
    setMessage(why)
    setErrors(fieldErrors)
  }
  const submit = async (event: Event) => {
    event.preventDefault()
    const masked = maskedPaths(form)
    if (masked.length > 0) {
      const errors = masked.map((path) => ({ path, message: 'is hidden: enter it again' }))
      return reject('Some values must be entered again', errors)
    }
    setBusy(true)
    try {
      const { task_id } = await api.submit(requestOf(form))
      go(taskHref(task_id))
    } catch (err) {
      reject(messageOf(err), err instanceof ApiError ? err.errors : [])
      setBusy(false)
    }
  }
  return (
    <form class="submit" onSubmit={submit} noValidate>
      <ObjectFields field={form} path="" errors={byPath} onChange={setForm} />
      <div class="actions">
        <button type="submit" class="primary" disabled={isBusy}>
          Run
        </button>
        <div role="alert">
          {message !== '' && <p class="message error">{message}</p>}
          {errors.length > 0 && (
            <ul class="errors">
              {errors.map(({ path, message }) => (
                <li key={path}>
                  {shown.has(path) ? (
                    <button type="button" class="link" onClick={() => focusField(path)}>
                      {visible(path)}
                    </button>
                  ) : (
                    visible(path)
                  )}{' '}
                  {message}
                </li>
              ))}
            </ul>
          )}
        </div>
      </div>
    </form>
  )
}

function focusField(path: string): void {
  document.getElementById(path)?.focus()
}

async function emptyForm(): Promise<ObjectField> {
  const { schemas } = (await api.description()).components
  const form = fieldOf('', schemas.TaskRunnerRequest ?? {}, schemas)
  if (form?.kind !== 'object') throw new Error('The service does not describe its requests')
  return form
}

/** Suggests an id, which is sufficiently unique. */
function newId(): string {
  const time = new Date().toISOString().slice(0, 19).replace(/\D/g, '')
  return `web-${time}-${Math.random().toString(36).slice(2, 6)}`
}

function nextId(id: string): string {
  const [, base = id, count = '1'] = /^(.*)-again-(\d+)$/.exec(id) ?? []
  return `${base}-again-${Number(count) + (base === id ? 0 : 1)}`
}
