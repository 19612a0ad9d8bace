import { mkdir, mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Browser, Page } from 'playwright-core'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { type PastTask, putPastTasks } from '../helpers/past-tasks.ts'
import { whyNot } from '../helpers/programs.ts'
import { type Receiver, startReceiver } from '../helpers/receiver.ts'
import { type Service, startService } from '../helpers/service.ts'
import { expectAccessible, launch, longestTaskMs, openPage, type Watched } from './browser.ts'

const skipped = whyNot('chromium')
const POLL = { timeout: 20_000, interval: 20 }
/** While other tests keep the machine busy. */
const SLOW_MS = 90_000
const SEALING_KEY = Buffer.alloc(32, 7).toString('base64')
const TOKEN = 'a-token-of-the-page-test'
const PAST = 10_000
/** Far more than anything here takes, also on a busy machine. */
const LONG_TASK_MS_MAX = 3000
const MEGABYTE = 1024 * 1024

const HOSTILE_ID = `<img src=x onerror=alert(1)> \u202egnp.exe "><script>alert(2)</script>`
const HOSTILE_LOG = [
  '<script>alert(3)</script><img src=x onerror="alert(4)">',
  '\u001b]0;another title\u0007after the title',
  '\u001b]8;;javascript:alert(5)\u0007a link\u001b]8;;\u0007',
  '\u001b[2J\u001b[1;1Hafter the cursor',
  '\u001b[31mred\u001b[0m and \u001b[1;42mbold on green\u001b[0m',
  'safe \u202e txet desrever',
  'a bell \u0007 and an escape \u001b',
  '\u001b[38;5;196mpalette\u001b[38;2;1;2;3mtrue\u001b[0m',
  '{{constructor.constructor("alert(6)")()}}',
].join('\n')

function tests(): void {
  let folder: string
  let service: Service
  let guarded: Service
  let receiver: Receiver
  let browser: Browser
  const watched: Watched[] = []

  const open = async (hash = '#/', options: Parameters<typeof openPage>[2] = {}) => {
    const opened = await openPage(browser, `${service.url}/${hash}`, options)
    watched.push(opened)
    return opened.page
  }
  const submit = async (request: object) => {
    const answer = await fetch(`${service.url}/task-runner`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ worker_config: {}, ...request }),
    })
    expect(answer.status).toBe(200)
  }
  const task = async (id: string) => {
    const answer = await fetch(`${service.url}/tasks/${encodeURIComponent(id)}`)
    return (await answer.json()) as Record<string, unknown>
  }
  const waiting = (id: string, more: object = {}) =>
    submit({
      task_id: id,
      task_file_name: 'bad-waits.sh',
      worker_config: { env_variables: { GATE: folder } },
      ...more,
    })

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'task-runner-page-'))
    const dataDir = join(folder, 'data')
    await mkdir(dataDir)
    await putPastTasks(dataDir, SEALING_KEY, pastTasks())
    ;[service, guarded, receiver, browser] = await Promise.all([
      startService({ DATA_DIR: dataDir, SEALING_KEY, MAX_CONCURRENT_TASKS: '8' }),
      startService({
        ...{ DATA_DIR: join(folder, 'guarded'), API_TOKENS: TOKEN, BASE_PATH: '/runner' },
      }),
      startReceiver(),
      launch(),
    ])
  })
  afterAll(async () => {
    await browser?.close()
    // Ends tasks that wait.
    await rm(folder, { recursive: true, force: true, maxRetries: 10 })
    await Promise.all([service?.kill(), guarded?.kill()])
    await receiver?.[Symbol.asyncDispose]()
    await rm(folder, { recursive: true, force: true, maxRetries: 10 })
  })
  afterEach(async () => {
    for (const { page, troubles } of watched.splice(0)) {
      expect(troubles).toEqual([])
      await page.context().close()
    }
  })

  test('a task is posted with the form, and its log arrives as it is printed', async () => {
    const pieces = join(folder, 'pieces')
    await mkdir(pieces)
    const print = async (count: number, text: string) => {
      await writeFile(join(pieces, 'draft'), text)
      await rename(join(pieces, 'draft'), join(pieces, String(count)))
    }
    const page = await open()
    await page.getByRole('link', { name: 'Run a task' }).click()
    await expect.poll(() => page.getByLabel('task_id').inputValue(), POLL).toMatch(/^web-/)
    await page.getByLabel('task_id').fill('from-the-form')
    const suggested = page.locator('#task-files option[value="bad-pieces.sh"]')
    await suggested.waitFor({ state: 'attached' })
    await page.getByLabel('task_file_name').fill('bad-pieces.sh')
    await page.getByRole('button', { name: 'Add to env_variables' }).click()
    await page.getByLabel('Name 1 of env_variables').fill('PIECES')
    await page.getByLabel('Value of PIECES').fill(pieces)
    await page.getByRole('button', { name: 'Run', exact: true }).click()

    await page.getByRole('heading', { name: 'from-the-form' }).getByText('running').waitFor()
    await print(0, 'the first piece\n')
    await page.getByRole('log').getByText('the first piece').waitFor()
    await print(1, '\u001b[32mthe second piece\u001b[0m\nwithout an end')
    await page.getByRole('log').getByText('without an end').waitFor()
    expect(await task('from-the-form')).toMatchObject({ status: 'running' })
    await print(2, ' of its line\n')
    await page.getByRole('log').getByText('without an end of its line').waitFor()
    expect(await page.locator('.line').allInnerTexts()).toHaveLength(3)

    await writeFile(join(pieces, 'end'), '')
    await page.getByRole('heading', { name: 'from-the-form' }).getByText('succeeded').waitFor()
    const steps = await page.locator('.timeline .what').allInnerTexts()
    expect(steps).toEqual(['queued', 'provisioning', 'running', 'succeeded'])
    expect(await page.locator('.timeline').innerText()).toContain('exit code 0')
    await page.getByText('complete', { exact: true }).waitFor()
  })

  test('an invalid field is shown with its error', async () => {
    const page = await open('#/run')
    await page.getByLabel('task_file_name').fill('hello.txt')
    await page.getByLabel('callback_url', { exact: true }).fill('ftp://example.com')
    await page.getByText('More fields').first().click()
    await page.getByRole('button', { name: 'Add to git_configs' }).click()
    await page.getByRole('button', { name: 'Run', exact: true }).click()
    const file = page.getByLabel('task_file_name')
    await expect.poll(() => file.getAttribute('aria-invalid'), POLL).toBe('true')
    expect(await page.getByRole('alert').innerText()).toContain(
      'callback_url must be http or https',
    )
    expect(await page.locator('[id="task_file_name-hint"]').innerText()).toContain('must end in')
    const url = page.getByLabel('remote_url')
    expect(await url.getAttribute('aria-invalid')).toBe('true')
    await page.getByRole('button', { name: 'callback_url', exact: true }).click()
    expect(await page.evaluate('document.activeElement.id')).toBe('callback_url')
    await expectAccessible(page)
  })

  test('a task is cancelled', async () => {
    await waiting('to-cancel')
    const page = await open('#/tasks/to-cancel')
    await page.getByRole('button', { name: 'Cancel' }).click()
    expect(await task('to-cancel')).not.toMatchObject({ status: 'cancelled' })
    await page.getByRole('button', { name: 'Really cancel?' }).click()
    await page.getByRole('heading', { name: 'to-cancel' }).getByText('cancelled').waitFor()
    await page.getByText('complete', { exact: true }).waitFor()
  })

  test('what a task waits for is shown with the task and in the list', async () => {
    const reason = 'The Docker engine does not answer (ECONNREFUSED \u202e)'
    await waiting('hindered')
    const page = await open()
    await page.route(/\/tasks(\?|\/hindered$)/, async (route) => {
      const answer = await route.fetch()
      const body = await answer.text()
      const json = body.replaceAll(
        /("task_id":"hindered".*?)"waiting_for":null/g,
        (_, before) => `${before}"waiting_for":${JSON.stringify(reason)}`,
      )
      await route.fulfill({ response: answer, body: json })
    })
    await page.goto(`${service.url}/#/tasks/hindered`)
    const shown = page.getByText('Waits: The Docker engine does not answer (ECONNREFUSED')
    await shown.waitFor()
    expect(await shown.innerText()).not.toContain('\u202e')
    await expectAccessible(page)
    await page.goto(`${service.url}/#/tasks`)
    const row = page.getByRole('row').filter({ hasText: 'hindered' })
    await row.getByTitle('Waits: The Docker engine').waitFor()
    await fetch(`${service.url}/tasks/hindered/cancel`, { method: 'POST' })
  })

  test('a callback is delivered again', async () => {
    await submit({ task_id: 'called', task_file_name: 'echo.sh', callback_url: receiver.url })
    const page = await open('#/tasks/called')
    await page.locator('.timeline').getByText('callback 1').waitFor()
    await page.getByRole('button', { name: 'Redeliver' }).click()
    await page.locator('.timeline').getByText('callback 2').waitFor()
    expect(await page.locator('.timeline li').last().innerText()).toContain('HTTP 200')
    const ids = receiver.received.map(({ headers }) => headers['webhook-id'])
    expect(ids).toEqual([ids[0], ids[0]])
  })

  test('a task is run again; masked values are entered again, and never sent as they are', async () => {
    await submit({
      task_id: 'first-run',
      task_file_name: 'bad-variables.sh',
      worker_config: { env_variables: { SHOW: 'GREETING', GREETING: 'hello' }, log_level: 'DEBUG' },
      timeout_seconds: 77,
    })
    const page = await open('#/tasks/first-run')
    await page.getByRole('log').getByText('GREETING=hello').waitFor()
    await page.getByRole('link', { name: 'Run again' }).click()
    await page.getByText('Values of variables are hidden').waitFor()
    expect(await page.getByLabel('task_id').inputValue()).toBe('first-run-again-1')
    expect(await page.getByLabel('timeout_seconds').inputValue()).toBe('77')
    expect(await page.getByLabel('log_level', { exact: true }).inputValue()).toBe('DEBUG')
    expect(await page.getByLabel('Value of GREETING').inputValue()).toBe('')
    await page.getByRole('button', { name: 'Run', exact: true }).click()
    await page.getByText('Some values must be entered again').waitFor()
    await page.getByLabel('Value of SHOW').fill('GREETING')
    await page.getByLabel('Value of GREETING').fill('good evening')
    await page.getByRole('button', { name: 'Run', exact: true }).click()
    await page.getByRole('log').getByText('GREETING=good evening').waitFor()
    expect(await task('first-run-again-1')).toMatchObject({ timeout_seconds: 77 })
  })

  test('a worker is terminated', async () => {
    await waiting('on-a-worker')
    const page = await open('#/workers')
    const row = page.getByRole('row', { name: 'on-a-worker' })
    await row.getByText('Running').waitFor()
    await expectAccessible(page)
    await row.getByRole('button', { name: 'Terminate' }).click()
    await row.getByRole('button', { name: 'Really?' }).click()
    await row.waitFor({ state: 'detached' })
    await expect.poll(async () => (await task('on-a-worker')).status, POLL).toBe('cancelled')
    await page.getByRole('button', { name: 'Clean up' }).click()
    await page.getByRole('button', { name: 'Really terminate them?' }).click()
    await page.getByText('Terminated 0 workers').waitFor()
  })

  test('signing in and out, below a base path', async () => {
    const opened = await openPage(browser, `${guarded.url}/#/tasks`)
    watched.push(opened)
    const { page } = opened
    await page.getByLabel('API token').waitFor()
    await expectAccessible(page)
    await page.getByLabel('API token').fill('wrong')
    await page.getByRole('button', { name: 'Sign in' }).click()
    await page.getByText('The token is invalid').waitFor()
    await page.getByLabel('API token').fill(TOKEN)
    await page.getByLabel('API token').press('Enter')
    await page.getByText('No tasks yet').waitFor()
    await page.reload()
    await page.getByText('No tasks yet').waitFor()
    expect(await page.evaluate('document.cookie + JSON.stringify(localStorage)')).toBe('{}')
    await page.context().clearCookies()
    // The next look at the list is refused.
    await page.getByLabel('API token').fill(TOKEN)
    await page.getByRole('button', { name: 'Sign in' }).click()
    await page.getByRole('button', { name: 'Sign out' }).click()
    await page.getByLabel('API token').waitFor()
    expect(await page.context().cookies()).toEqual([])
  })

  test(
    'ten thousand tasks are listed smoothly, by few elements',
    async () => {
      const page = await open('#/tasks')
      const rows = page.locator('.rows .row')
      await rows.first().waitFor()
      await longestTaskMs(page)
      // Again and again, since each time the end is further down.
      const last = rows.getByText('past-00000', { exact: true })
      await expect
        .poll(
          async () => {
            await page.evaluate(`document.querySelector('.scroller').scrollTop = 1e9`)
            return last.count()
          },
          { timeout: 60_000, interval: 1 },
        )
        .toBe(1)
      expect(await rows.count()).toBeLessThan(90)
      for (const place of [0.5, 0.1, 0.9]) {
        await page.evaluate(
          `(() => { const list = document.querySelector('.scroller'); list.scrollTop = list.scrollHeight * ${place} })()`,
        )
        const about = String(Math.round(PAST * (1 - place))).padStart(5, '0')
        await rows
          .getByText(`past-${about.slice(0, 3)}`)
          .first()
          .waitFor()
      }
      expect(await longestTaskMs(page)).toBeLessThan(LONG_TASK_MS_MAX)

      await page.getByLabel('Search').fill('past-0012')
      await expect.poll(() => rows.count(), POLL).toBe(10)
      await page.getByLabel('Search').fill('past-00')
      await page.getByLabel('Search').press('Enter')
      await page.getByText('No task has exactly this ID.').waitFor()
      await page.getByLabel('Search').fill('past-00123')
      await page.getByLabel('Search').press('Enter')
      await page.getByRole('heading', { name: 'past-00123' }).waitFor()
    },
    SLOW_MS,
  )

  test('filters ask the service', async () => {
    const page = await open('#/tasks')
    await page.getByLabel('Status').selectOption('failed')
    await page.getByLabel('Callback').selectOption('given_up')
    const rows = page.locator('.rows .row')
    await expect.poll(() => rows.count(), POLL).toBe(PAST / 1000)
    expect(new Set(await rows.locator('.status-cell').allInnerTexts())).toEqual(new Set(['failed']))
    await page.getByLabel('Task file').fill('nothing.sh')
    await page.getByLabel('Task file').press('Tab')
    await page.getByText('No tasks match.').waitFor()
  })

  test('the list lives, and does not move under its reader', async () => {
    const page = await open('#/tasks')
    const rows = page.locator('.rows .row')
    await rows.first().waitFor()
    await waiting('comes-alive')
    const row = page.getByRole('row', { name: 'comes-alive' })
    await row.getByText('running').waitFor()

    await page.evaluate(`document.querySelector('.scroller').scrollTop = 1900`)
    const places = () =>
      page.evaluate<string[]>(
        `[...document.querySelectorAll('.rows .row')].map((row) => row.querySelector('a').textContent + ' ' + Math.round(row.getBoundingClientRect().top))`,
      )
    await expect.poll(async () => (await places()).length, POLL).toBeGreaterThan(30)
    const before = await places()
    await submit({ task_id: 'comes-later', task_file_name: 'echo.sh' })
    const fresh = page.getByRole('button', { name: '1 new task' })
    await fresh.waitFor()
    expect(await places()).toEqual(before)
    await fresh.click()
    await page.getByRole('row', { name: 'comes-later' }).waitFor()

    // One that no longer fits stays, and tells so.
    await page.getByLabel('Status').selectOption('running')
    await row.getByText('running').waitFor()
    await fetch(`${service.url}/tasks/comes-alive/cancel`, { method: 'POST' })
    await row.getByText('cancelled').first().waitFor()
  })

  test('a log of 5 MB does not freeze the page, nor does a line of one', async () => {
    const page = await open('#/tasks/long-log')
    const log = page.getByRole('log')
    await log.getByText('the last line').waitFor()
    expect(await page.locator('.line').count()).toBeLessThan(100)
    await page.getByPlaceholder('Search the log').fill('line 60000 ')
    await page.getByText('1 of 1 line').waitFor()
    await page.getByPlaceholder('Search the log').press('Enter')
    await page.locator('.line.chosen .match').getByText('line 60000 ').waitFor()
    expect(await page.getByLabel('Follow').isChecked()).toBe(false)
    expect(await longestTaskMs(page)).toBeLessThan(LONG_TASK_MS_MAX)

    const [download] = await Promise.all([
      page.waitForEvent('download'),
      page.getByRole('link', { name: 'Download' }).click(),
    ])
    expect(download.suggestedFilename()).toBe('long-log.log')

    await page.goto(`${service.url}/#/tasks/long-line`)
    await page.getByText('complete', { exact: true }).waitFor()
    await log.getByText('and its end').waitFor()
    await page.evaluate(`document.querySelector('.lines').scrollTop = 30000`)
    await expect.poll(() => page.getByLabel('Follow').isChecked(), POLL).toBe(false)
    expect(await page.locator('.line').count()).toBeLessThan(100)
    expect(await longestTaskMs(page)).toBeLessThan(LONG_TASK_MS_MAX)
  })

  test('hostile names and logs are text and nothing else', async () => {
    const page = await open('#/tasks')
    await page.getByLabel('Search').fill('<img')
    const link = page.locator('.rows a').getByText('<img src=x onerror=alert(1)>')
    await link.waitFor()
    expect(await link.innerText()).toContain('‹U+202E›gnp.exe')
    await link.click()
    await page.getByRole('heading', { level: 1 }).getByText('<script>').waitFor()
    const lines = page.getByRole('log').locator('.line')
    await expect.poll(() => lines.count(), POLL).toBe(9)
    const texts = (await lines.allInnerTexts()).map((text) => text.replace(/^\s*\d+\s*/, ''))
    expect(texts).toEqual([
      '<script>alert(3)</script><img src=x onerror="alert(4)">',
      'after the title',
      'a link',
      'after the cursor',
      'red and bold on green',
      'safe ‹U+202E› txet desrever',
      'a bell ␇ and an escape ␛',
      'palettetrue',
      '{{constructor.constructor("alert(6)")()}}',
    ])
    expect(await page.locator('main img, main script, main iframe, .log .line a').count()).toBe(0)
    expect(await page.title()).toContain('Task runner')
    await expectAccessible(page)
  })

  test('at the width of a phone nothing is wider than the screen', async () => {
    await waiting('on-a-phone', { callback_url: `${receiver.url}?${'x'.repeat(300)}` })
    const page = await open('#/', { viewport: { width: 320, height: 640 } })
    const pages = [
      { hash: '#/', wait: '.charts' },
      { hash: '#/tasks', wait: '.rows .row' },
      { hash: '#/tasks/on-a-phone', wait: '.line' },
      { hash: `#/tasks/${encodeURIComponent(HOSTILE_ID)}`, wait: '.line' },
      { hash: '#/workers', wait: '.workers .row:not(.head)' },
      { hash: '#/run/on-a-phone', wait: '.submit' },
    ]
    for (const { hash, wait } of pages) {
      await page.evaluate(`location.hash = ${JSON.stringify(hash)}`)
      await page.locator(wait).first().waitFor()
      expect
        .soft(await page.evaluate('document.scrollingElement.scrollWidth'), hash)
        .toBeLessThanOrEqual(320)
    }
  })

  test('everything is done by keyboard, with the focus to be seen', async () => {
    const page = await open()
    await page.locator('.charts').waitFor()
    await tabTo(page, 'Run a task')
    await page.keyboard.press('Enter')
    await expect
      .poll(() => page.evaluate('document.activeElement.textContent'), POLL)
      .toBe('Run a task')
    await page.getByLabel('task_id').waitFor()
    await tabTo(page, 'task_id')
    await page.keyboard.press('ControlOrMeta+A')
    await page.keyboard.type('by-keyboard')
    await tabTo(page, 'task_file_name')
    await page.keyboard.type('w-eval.sh')
    await tabTo(page, 'Add to env_variables')
    await page.keyboard.press('Enter')
    await page.keyboard.press('Shift+Tab')
    await page.keyboard.press('Shift+Tab')
    await page.keyboard.press('Shift+Tab')
    await page.keyboard.type('SCRIPT')
    await page.keyboard.press('Tab')
    await page.keyboard.type('echo typed')
    await tabTo(page, 'Run')
    await page.keyboard.press('Enter')
    await page.getByRole('log').getByText('typed').waitFor()
    await tabTo(page, 'Run again')
    // There is a way on from the log.
    await tabTo(page, 'Log')
    await tabTo(page, 'Skip to the content')
  })

  test(
    'light and dark, as the system or its reader wishes; both can be read',
    async () => {
      const page = await open('#/', { colorScheme: 'dark' })
      const ground = () =>
        page.evaluate('getComputedStyle(document.documentElement).backgroundColor')
      const views = ['#/', '#/tasks', '#/tasks/long-log', '#/run']
      await page.locator('.charts').waitFor()
      expect(await ground()).toBe('rgb(16, 18, 22)')
      for (const hash of views) {
        await page.evaluate(`location.hash = ${JSON.stringify(hash)}`)
        await page.locator('.charts, .rows .row, .line, .submit').first().waitFor()
        await expectAccessible(page)
      }
      await page.getByRole('button', { name: 'Use the light theme' }).click()
      expect(await ground()).toBe('rgb(246, 247, 249)')
      await page.reload()
      await page.getByRole('button', { name: 'Use the dark theme' }).waitFor()
      expect(await ground()).toBe('rgb(246, 247, 249)')
      for (const hash of views) {
        await page.evaluate(`location.hash = ${JSON.stringify(hash)}`)
        await page.locator('.charts, .rows .row, .line, .submit').first().waitFor()
        await expectAccessible(page)
      }
    },
    SLOW_MS,
  )
}

/** Presses Tab until what has this name is focused, and can be seen to be. */
async function tabTo(page: Page, name: string): Promise<void> {
  for (let presses = 0; presses < 80; presses += 1) {
    await page.keyboard.press('Tab')
    const focused = await page.evaluate<{ name: string; isSeen: boolean }>(`(() => {
      const element = document.activeElement
      const label = element.labels?.[0]?.firstChild?.textContent
      const name = element.getAttribute('aria-label') ?? label ?? element.textContent
      const seen = [element, element.closest('label')].some((each) => {
        const styles = each === null ? [] : [getComputedStyle(each), getComputedStyle(each, '::after')]
        return styles.some(({ outlineStyle, outlineWidth }) => outlineStyle !== 'none' && outlineWidth !== '0px')
      })
      return { name: name.trim(), isSeen: seen || element === document.body }
    })()`)
    expect(focused, `focus on ${focused.name}`).toMatchObject({ isSeen: true })
    if (focused.name === name) return
  }
  throw new Error(`Tab does not reach "${name}"`)
}

/** In the order of their acceptance; the last ones are those that tests look for by name. */
function pastTasks(): PastTask[] {
  const hourAgo = Date.now() - 3_600_000
  const many = Array.from({ length: PAST }, (_, index): PastTask => {
    const createdAt = hourAgo + index * 300
    const isBad = index % 100 === 99
    return {
      taskId: `past-${String(index).padStart(5, '0')}`,
      taskFileName: 'echo.sh',
      ...{ createdAt, claimedAt: createdAt + 5, startedAt: createdAt + 10 },
      finishedAt: createdAt + 200,
      ...(isBad ? { status: 'failed', reason: 'exit_code', exitCode: 3 } : {}),
      ...(isBad
        ? { callback: { status: index % 1000 === 999 ? 'given_up' : 'delivered', delayMs: 5 } }
        : {}),
    }
  })
  const at = Date.now() - 60_000
  const times = { createdAt: at, claimedAt: at + 1, startedAt: at + 2, finishedAt: at + 900 }
  return [
    ...many,
    { taskId: HOSTILE_ID, taskFileName: '<b>bold</b>.sh', log: HOSTILE_LOG, ...times },
    { taskId: 'long-log', taskFileName: 'echo.sh', log: longLog(), ...times },
    { taskId: 'long-line', taskFileName: 'echo.sh', log: longLine(), ...times },
  ]
}

function longLog(): string {
  const lines: string[] = []
  for (let size = 0; size < 5 * MEGABYTE - 100; ) {
    const line = `\u001b[3${lines.length % 8}mline ${lines.length + 1} \u001b[0mof a long log, with words to fill it`
    lines.push(line)
    size += line.length + 1
  }
  return `${lines.join('\n')}\nthe last line\n`
}

function longLine(): string {
  return `${'x'.repeat(5 * MEGABYTE - 100)} and its end`
}

if (skipped === undefined) describe('the web page', tests)
else describe('the web page', () => test.skip(skipped, () => {}))
