import { useState } from 'preact/hooks'
import { api } from '../api.ts'
import { useAction } from '../live.ts'
import { Heading, Message } from '../parts.tsx'

export function SignInView({ onSignedIn }: { onSignedIn: () => void }) {
  const [token, setToken] = useState('')
  const action = useAction()
  const submit = async (event: Event) => {
    event.preventDefault()
    if (await action.run(() => api.signIn(token.trim()))) onSignedIn()
  }
  return (
    <form class="card sign-in" onSubmit={submit}>
      <Heading title="Sign in">Sign in</Heading>
      <label>
        API token
        <input
          type="password"
          autocomplete="current-password"
          required
          value={token}
          onInput={(event) => setToken(event.currentTarget.value)}
        />
      </label>
      <p class="hint">
        One of the service's tokens. It is stored in a cookie that scripts cannot read.
      </p>
      <button type="submit" class="primary" disabled={action.isBusy}>
        Sign in
      </button>
      <Message text={action.message} isError={action.isError} />
    </form>
  )
}
