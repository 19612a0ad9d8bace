import { useState } from 'preact/hooks'
import { below, type Entry, type Field, isFilled, type ObjectField } from './form-model.ts'
import { TASK_FILES } from './task-files.tsx'
import { visible } from './text.ts'

interface FieldProps<F extends Field = Field, Changed extends Field = Field> {
  field: F
  path: string
  /** Error messages by path. */
  errors: ReadonlyMap<string, string>
  onChange: (field: Changed) => void
}

type Of<Kind extends Field['kind']> = FieldProps<Extract<Field, { kind: Kind }>>

/** Renders a field and the fields inside it. */
function FieldView({ field, ...rest }: FieldProps) {
  switch (field.kind) {
    case 'object':
      return <GroupField field={field} {...rest} />
    case 'list':
      return <ListField field={field} {...rest} />
    case 'map':
      return <MapField field={field} {...rest} />
    default:
      return <InputField field={field} {...rest} />
  }
}

/** Renders the usual fields of an object, and the others under "More fields". */
export function ObjectFields(props: FieldProps<ObjectField, ObjectField>) {
  const { field, path, errors, onChange } = props
  const put = (changed: Field) => {
    const fields = field.fields.map((each) => (each.name === changed.name ? changed : each))
    onChange({ ...field, fields })
  }
  const view = (each: Field) => (
    <FieldView
      key={each.name}
      field={each}
      path={below(path, each.name)}
      errors={errors}
      onChange={put}
    />
  )
  const others = field.fields.filter((each) => !each.isUsual)
  const [isShown, setShown] = useState(() => others.some(isFilled))
  const isWrong = others.some((each) => hasError(errors, below(path, each.name)))
  return (
    <>
      {field.fields.filter((each) => each.isUsual).map(view)}
      {others.length > 0 && (
        <details open={isShown || isWrong} onToggle={(event) => setShown(event.currentTarget.open)}>
          <summary>More fields</summary>
          {others.map(view)}
        </details>
      )}
    </>
  )
}

function GroupField(props: Of<'object'>) {
  return (
    <fieldset>
      <legend>{props.field.name || `no. ${Number(props.path.split('.').at(-1)) + 1}`}</legend>
      <Hint {...props} />
      <ObjectFields {...props} />
    </fieldset>
  )
}

function InputField({ field, path, errors, onChange }: Of<'text' | 'number' | 'choice'>) {
  const label = field.name || `no. ${Number(path.split('.').at(-1)) + 1}`
  const put = (value: string) =>
    onChange(field.kind === 'text' ? { ...field, value, masked: undefined } : { ...field, value })
  const shared = {
    id: path,
    value: field.value,
    'aria-required': field.isRequired,
    'aria-invalid': errors.has(path),
    'aria-describedby': `${path}-hint`,
    onInput: (event: Event & { currentTarget: { value: string } }) =>
      put(event.currentTarget.value),
  }
  return (
    <div class="field">
      <label for={path}>
        {label}
        {field.isRequired && <span class="quiet"> required</span>}
      </label>
      {field.kind === 'choice' && (
        <select {...shared}>
          <option value="">{field.isRequired ? '' : 'default'}</option>
          {field.options.map((option) => (
            <option value={option} key={option}>
              {option}
            </option>
          ))}
        </select>
      )}
      {field.kind === 'number' && (
        <input {...shared} type="number" min={field.min} max={field.max} step="any" />
      )}
      {field.kind === 'text' && field.isLong && (
        <textarea {...shared} rows={3} spellcheck={false} />
      )}
      {field.kind === 'text' && !field.isLong && field.isSecret && (
        <input {...shared} type="password" autocomplete="new-password" />
      )}
      {field.kind === 'text' && !field.isLong && !field.isSecret && (
        <input
          {...shared}
          type="text"
          autocomplete="off"
          spellcheck={false}
          list={field.name === 'task_file_name' ? TASK_FILES : undefined}
        />
      )}
      {field.kind === 'text' && field.masked !== undefined && (
        <p class="again">
          Part of {visible(field.masked)} is hidden: enter it again, or{' '}
          <button type="button" onClick={() => put('')}>
            leave it out
          </button>
        </p>
      )}
      <Hint field={field} path={path} errors={errors} />
    </div>
  )
}

function ListField(props: Of<'list'>) {
  const { field, path, errors, onChange } = props
  return (
    <fieldset>
      <legend>{field.name}</legend>
      <Hint {...props} />
      {field.items.map((item, index) => (
        <div class="item" key={index}>
          <FieldView
            field={item}
            path={below(path, String(index))}
            errors={errors}
            onChange={(changed) => onChange({ ...field, items: field.items.with(index, changed) })}
          />
          <button
            type="button"
            aria-label={`Remove ${field.name} no. ${index + 1}`}
            onClick={() => onChange({ ...field, items: field.items.toSpliced(index, 1) })}
          >
            Remove
          </button>
        </div>
      ))}
      <button
        type="button"
        onClick={() => onChange({ ...field, items: [...field.items, field.newItem()] })}
      >
        Add to {field.name}
      </button>
    </fieldset>
  )
}

function MapField(props: Of<'map'>) {
  const { field, path, errors, onChange } = props
  const put = (index: number, change: Partial<Entry>) => {
    const entries = field.entries.map((entry, at) =>
      at === index ? { ...entry, ...change } : entry,
    )
    onChange({ ...field, entries })
  }
  return (
    <fieldset>
      <legend>{field.name}</legend>
      <Hint {...props} />
      {field.entries.map((entry, index) => {
        const error = errors.get(below(path, entry.name))
        const about = entry.name === '' ? `no. ${index + 1}` : visible(entry.name)
        return (
          <div class="entry" key={index}>
            <input
              aria-label={`Name ${index + 1} of ${field.name}`}
              placeholder="NAME"
              autocomplete="off"
              spellcheck={false}
              value={entry.name}
              onInput={(event) => put(index, { name: event.currentTarget.value })}
            />
            <input
              aria-label={`Value of ${about}`}
              placeholder={entry.isMasked ? 'hidden: enter it again' : 'value'}
              autocomplete="off"
              spellcheck={false}
              value={entry.value}
              aria-invalid={error !== undefined}
              onInput={(event) => put(index, { value: event.currentTarget.value, isMasked: false })}
            />
            <button
              type="button"
              aria-label={`Remove ${about}`}
              onClick={() => onChange({ ...field, entries: field.entries.toSpliced(index, 1) })}
            >
              Remove
            </button>
            {error && <p class="error">{error}</p>}
          </div>
        )
      })}
      <button
        type="button"
        onClick={() => {
          const entry = { name: '', value: '', isMasked: false }
          onChange({ ...field, entries: [...field.entries, entry] })
        }}
      >
        Add to {field.name}
      </button>
    </fieldset>
  )
}

function Hint({ field, path, errors }: Omit<FieldProps, 'onChange'>) {
  const error = errors.get(path)
  if (error === undefined && field.description === '') return null
  return (
    <p class="hint" id={`${path}-hint`}>
      {error && <strong class="error">{error}</strong>}{' '}
      {field.description
        .split('`')
        .map((part, index) => (index % 2 === 1 ? <code key={part}>{part}</code> : part))}
    </p>
  )
}

function hasError(errors: ReadonlyMap<string, string>, path: string): boolean {
  return [...errors.keys()].some((each) => each === path || each.startsWith(`${path}.`))
}
