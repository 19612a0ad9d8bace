import type { ComponentChildren } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import { clock } from './text.ts'

/** The page's heading. It is focused after navigation, so that screen readers announce the page. */
export function Heading({ children, title }: { children: ComponentChildren; title: string }) {
  const heading = useRef<HTMLHeadingElement>(null)
  useEffect(() => {
    document.title = `${title} · Task runner`
    // The first page was not navigated to.
    if (document.body.dataset.visited !== undefined) heading.current?.focus()
    document.body.dataset.visited = ''
  }, [title])
  return (
    <h1 ref={heading} tabIndex={-1}>
      {children}
    </h1>
  )
}

export function Time({ at }: { at: string }) {
  return (
    <time dateTime={at} title={at}>
      {clock(at)}
    </time>
  )
}

/** A button for an irreversible action. The first press asks, the second confirms. */
export function ConfirmButton(props: {
  label: string
  question: string
  /** Object of the action for screen readers, if the label does not name it. */
  about?: string
  isBusy?: boolean
  onConfirm: () => void
}) {
  const [isAsked, setAsked] = useState(false)
  const label = isAsked ? props.question : props.label
  return (
    <button
      type="button"
      class={isAsked ? 'danger asked' : 'danger'}
      aria-label={props.about && `${label} ${props.about}`}
      disabled={props.isBusy}
      onBlur={() => setAsked(false)}
      onClick={() => {
        setAsked(!isAsked)
        if (isAsked) props.onConfirm()
      }}
    >
      {label}
    </button>
  )
}

/** The result of an action. It is rendered while empty: screen readers announce new text only. */
export function Message({ text, isError }: { text: string; isError: boolean }) {
  return (
    <p role="status" class={isError ? 'message error' : 'message'}>
      {text}
    </p>
  )
}

export function Problem({ text }: { text: string | undefined }) {
  return (
    <p role="status" class={text === undefined ? 'message' : 'message error'}>
      {text}
    </p>
  )
}
