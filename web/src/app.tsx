import { useEffect, useRef, useState } from 'preact/hooks'
import { api, messageOf, type Session, whenSignedOut } from './api.ts'
import { type Route, useRoute } from './route.ts'
import { TaskFileSuggestions } from './task-files.tsx'
import { ThemeButton } from './theme.tsx'
import { OverviewView } from './views/overview.tsx'
import { RunView } from './views/run.tsx'
import { SignInView } from './views/sign-in.tsx'
import { TaskView } from './views/task.tsx'
import { TasksView } from './views/tasks.tsx'
import { WorkersView } from './views/workers.tsx'

const RETRY_MS = 2000

export function App() {
  const route = useRoute()
  const main = useRef<HTMLElement>(null)
  const { session, setSession, problem } = useSession()
  const signOut = async () => {
    await api.signOut().catch(() => {})
    setSession({ needed: true, signed_in: false })
  }
  return (
    <>
      <button type="button" class="skip" onClick={() => main.current?.focus()}>
        Skip to the content
      </button>
      <header class="bar">
        <a class="brand" href="#/">
          <svg viewBox="0 0 16 16" aria-hidden="true">
            <rect width="16" height="16" rx="4" />
            <path d="M5.5 4.2v7.6L12 8z" />
          </svg>
          Task runner
        </a>
        {session?.signed_in && <Navigation route={route} />}
        <div class="end">
          {session?.signed_in && session.needed && (
            <button type="button" onClick={signOut}>
              Sign out
            </button>
          )}
          <ThemeButton />
        </div>
      </header>
      <main ref={main} tabIndex={-1} class={route.page}>
        {problem !== '' && (
          <p role="alert" class="message error">
            {problem}. Retrying.
          </p>
        )}
        {session && !session.signed_in && (
          <SignInView onSignedIn={() => setSession({ needed: true, signed_in: true })} />
        )}
        {session?.signed_in && <TaskFileSuggestions />}
        {session?.signed_in && <View route={route} />}
      </main>
    </>
  )
}

function Navigation({ route }: { route: Route }) {
  const link = (page: Route['page'], href: string, label: string) => (
    <a href={href} class={page} aria-current={route.page === page ? 'page' : undefined}>
      {label}
    </a>
  )
  return (
    <nav aria-label="Pages">
      {link('overview', '#/', 'Overview')}
      {link('tasks', '#/tasks', 'Tasks')}
      {link('workers', '#/workers', 'Workers')}
      {link('run', '#/run', 'Run a task')}
    </nav>
  )
}

function View({ route }: { route: Route }) {
  switch (route.page) {
    case 'overview':
      return <OverviewView />
    case 'tasks':
      return <TasksView />
    case 'task':
      return <TaskView key={route.id} id={route.id} />
    case 'workers':
      return <WorkersView />
    case 'run':
      return <RunView key={route.like ?? ''} like={route.like} />
  }
}

function useSession() {
  const [session, setSession] = useState<Session>()
  const [problem, setProblem] = useState('')
  useEffect(() => {
    let timer: number | undefined
    const load = async () => {
      try {
        setSession(await api.session())
        setProblem('')
      } catch (err) {
        setProblem(messageOf(err))
        timer = window.setTimeout(load, RETRY_MS)
      }
    }
    void load()
    whenSignedOut(() => setSession({ needed: true, signed_in: false }))
    return () => clearTimeout(timer)
  }, [])
  return { session, setSession, problem }
}
