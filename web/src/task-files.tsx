import { useEffect, useState } from 'preact/hooks'
import { api } from './api.ts'

/** Id of the list that suggests task files for inputs. */
export const TASK_FILES = 'task-files'

export function TaskFileSuggestions() {
  const [names, setNames] = useState<string[]>([])
  useEffect(() => {
    // Without suggestions, names can still be typed.
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
