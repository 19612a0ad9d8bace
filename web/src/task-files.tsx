import { useEffect, useState } from 'preact/hooks'
import { api } from './api.ts'

/** What inputs name as their `list`, to suggest what can be run. */
export const TASK_FILES = 'task-files'

export function TaskFileSuggestions() {
  const [names, setNames] = useState<string[]>([])
  useEffect(() => {
    // Only suggestions: where they cannot be had, names are typed all the same.
    api.taskFiles().then(
      ({ task_files }) => setNames(task_files),
      () => {},
    )
  }, [])
  return (
    <datalist id={TASK_FILES}>
      {names.map((name) => (
        <option value={name} key={name} />
      ))}
    </datalist>
  )
}
