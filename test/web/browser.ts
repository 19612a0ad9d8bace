import { createRequire } from 'node:module'
import { type Browser, type BrowserContextOptions, chromium, type Page } from 'playwright-core'
import { expect } from 'vitest'
import { CHROMIUM } from '../helpers/programs.ts'

const AXE = createRequire(import.meta.url).resolve('axe-core/axe.min.js')

export function launch(): Promise<Browser> {
  return chromium.launch({ executablePath: CHROMIUM, args: ['--no-sandbox'] })
}

/** What no page may do, whatever it shows. */
export interface Watched {
  page: Page
  /** Requests elsewhere, breaches of the content security policy, errors in the console, dialogs. */
  troubles: string[]
}

/** The browser tells of every answer that refuses; those are the subject of tests. */
const REFUSALS = /^Failed to load resource: .* (401|404|409|422) /

export async function openPage(
  browser: Browser,
  url: string,
  options: BrowserContextOptions = {},
): Promise<Watched> {
  const context = await browser.newContext({
    viewport: { width: 1240, height: 800 },
    reducedMotion: 'reduce',
    ...options,
  })
  const troubles: string[] = []
  const page = await context.newPage()
  page.setDefaultTimeout(20_000)
  page.on('request', (request) => {
    const isOwn = request.url().startsWith(`${new URL(url).origin}/`)
    if (!isOwn && !request.url().startsWith('data:')) troubles.push(`request to ${request.url()}`)
  })
  page.on('console', (message) => {
    if (message.type() !== 'error' && message.type() !== 'warning') return
    if (!REFUSALS.test(message.text())) troubles.push(message.text())
  })
  page.on('pageerror', (err) => troubles.push(String(err)))
  page.on('dialog', (dialog) => {
    troubles.push(`dialog: ${dialog.message()}`)
    void dialog.dismiss()
  })
  // As text: it runs in the browser, whose names the compiler does not know here.
  await context.addInitScript(`
    addEventListener('securitypolicyviolation', (event) => console.error('policy', event.violatedDirective))
    window.longestTaskMs = 0
    new PerformanceObserver((list) => {
      for (const { duration } of list.getEntries()) longestTaskMs = Math.max(longestTaskMs, duration)
    }).observe({ type: 'longtask' })
  `)
  await page.goto(url)
  return { page, troubles }
}

/** How long the page kept its reader waiting at most, since the last call. */
export async function longestTaskMs(page: Page): Promise<number> {
  return page.evaluate<number>(
    '(() => { const longest = longestTaskMs; longestTaskMs = 0; return longest })()',
  )
}

interface AxeResult {
  violations: {
    id: string
    impact: string
    nodes: { target: string[]; failureSummary: string }[]
  }[]
}

/** Nothing that keeps people from using the page. */
export async function expectAccessible(page: Page): Promise<void> {
  await page.evaluate(`typeof axe === 'undefined'`).then(async (isMissing) => {
    if (isMissing) await page.evaluate(await axeSource())
  })
  const { violations } = await page.evaluate<AxeResult>(
    `axe.run(document, { resultTypes: ['violations'] })`,
  )
  const told = violations.flatMap(({ id, impact, nodes }) =>
    nodes.map(({ target, failureSummary }) => `${impact} ${id} at ${target}: ${failureSummary}`),
  )
  expect(told).toEqual([])
}

let source: string | undefined

/** Given to the browser by its debugger, since the page's own policy would refuse it. */
async function axeSource(): Promise<string> {
  const { readFile } = await import('node:fs/promises')
  source ??= await readFile(AXE, 'utf8')
  return source
}
