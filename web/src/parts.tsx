import type { ComponentChildren } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import { clock } from './text.ts'

/** The page's heading, focused when the page was gone to, so that a screen reader tells it. */
export function Heading({ children, title }: { children: ComponentChildren; title: string }) {
  const heading = useRef<HTMLHeadingElement>(null)
  useEffect(() => {
    document.title = `${title} · Task runner`
    // On the first page the reader has not gone anywhere yet.
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

/** Does what cannot be undone at the second press; leaving it takes the first one back. */
export function ConfirmButton(props: {
  label: string
  sure: string
  /** Where the label does not say what it is about. */
  about?: string
  isBusy?: boolean
  onConfirm: () => void
}) {
  const [isAsked, setAsked] = useState(false)
  const label = isAsked ? props.sure : props.label
  return (
    <button
      type="button"
      class={isAsked ? 'danger sure' : 'danger'}
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

/** What an action came to; there from the start, so that a screen reader hears of it. */
export function Told({ told, isError }: { told: string; isError: boolean }) {
  return (
    <p role="status" class={isError ? 'told error' : 'told'}>
      {told}
    </p>
  )
}

export function Problem({ text }: { text: string | undefined }) {
  return (
    <p role="status" class={text === undefined ? 'told' : 'told error'}>
      {text}
    </p>
  )
}
