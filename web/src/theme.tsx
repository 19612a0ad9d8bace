import { useState } from 'preact/hooks'
import { useMedia } from './windowed.ts'

type Theme = 'light' | 'dark'

const KEY = 'task-runner-theme'

/** Applies the theme; called before the first rendering to avoid a flash of the other one. */
export function applyTheme(theme: Theme | undefined = kept()): void {
  if (theme) document.documentElement.dataset.theme = theme
}

export function ThemeButton() {
  const isDarkOutside = useMedia('(prefers-color-scheme: dark)')
  const [chosen, setChosen] = useState(kept)
  const theme = chosen ?? (isDarkOutside ? 'dark' : 'light')
  const other = theme === 'dark' ? 'light' : 'dark'
  const choose = () => {
    applyTheme(other)
    setChosen(other)
    try {
      localStorage.setItem(KEY, other)
    } catch {
      // Without storage, the choice lasts until the page is closed.
    }
  }
  return (
    <button type="button" class="icon" onClick={choose} aria-label={`Use the ${other} theme`}>
      <svg viewBox="0 0 16 16" aria-hidden="true">
        {theme === 'dark' ? (
          <path d="M8 4.8a3.2 3.2 0 1 0 0 6.4a3.2 3.2 0 1 0 0-6.4M8 1v1.4M8 13.6V15M1 8h1.4M13.6 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1" />
        ) : (
          <path d="M13.5 9.6A5.8 5.8 0 0 1 6.4 2.5a5.8 5.8 0 1 0 7.1 7.1z" />
        )}
      </svg>
    </button>
  )
}

function kept(): Theme | undefined {
  try {
    const theme = localStorage.getItem(KEY)
    return theme === 'light' || theme === 'dark' ? theme : undefined
  } catch {
    return undefined
  }
}
