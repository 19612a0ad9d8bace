export interface ServerEvent {
  id: string | undefined
  name: string
  data: string
}

/** Yields the events of a stream (WHATWG HTML, section 9.2.6) whose lines end in `\n`. */
export async function* readEvents(response: Response): AsyncGenerator<ServerEvent, void> {
  const decoder = new TextDecoder()
  let unread = ''
  for await (const chunk of response.body ?? []) {
    unread += decoder.decode(chunk, { stream: true })
    const blocks = unread.split('\n\n')
    unread = blocks.pop() ?? ''
    for (const block of blocks) {
      const lines = block.split('\n')
      const values = (field: string) =>
        lines.flatMap((line) =>
          line.startsWith(`${field}:`) ? [line.slice(field.length + 1).replace(/^ /, '')] : [],
        )
      const data = values('data')
      // A block without data is a keep-alive comment.
      if (data.length === 0) continue
      yield { id: values('id')[0], name: values('event')[0] ?? 'message', data: data.join('\n') }
    }
  }
}
