import type { ServerResponse } from 'node:http'
import type { Clock } from './clock.ts'
import type { Pod } from './resources.ts'
import { ApiError, badRequest, invalid } from './status.ts'

const RECORD_BYTES_MAX = 16 * 1024
const NEWLINE = 0x0a

interface LogRecord {
  /** Nanoseconds; no two records share one, unless time has `stopped`. */
  at: bigint
  bytes: Buffer
}

/** One container's log as its node keeps it: the runtime's records in the current file. */
interface ContainerLog {
  records: LogRecord[]
  bytes: number
  /** Per output stream, what waits for its newline. */
  pending: Map<string, Buffer>
  closed: boolean
  listeners: Set<(record: LogRecord | undefined) => void>
}

/** A follow that is open now, for tests to break. */
export interface LogStream {
  pod: string
  container: string
  /** Sends nothing more and stays open. */
  stall(): void
  /** Breaks the connection. */
  cut(): void
  /** Ends it cleanly, as if the container had ended. */
  end(): void
}

export class Logs {
  /** Past this size the file is rotated: a read sees only what was written since. */
  rotateAtBytes = Number.POSITIVE_INFINITY
  /** Records have the time of the one before. */
  stopped = false
  /** RFC3339Nano trims trailing zeros; kubelets of today write all nine digits (`fixed`). */
  timestampFormat: 'trimmed' | 'fixed' = 'trimmed'
  /** Names of pods whose node answers 200 with the words "unable to retrieve container logs". */
  readonly unavailable = new Set<string>()
  /** Names of pods whose node does not answer: 500. */
  readonly unreachable = new Set<string>()
  readonly streams = new Set<LogStream>()
  readonly #clock: Clock
  readonly #logs = new Map<string, ContainerLog>()
  #latest = 0n

  constructor(clock: Clock) {
    this.#clock = clock
  }

  /** Appends output as a runtime does: line by line, long lines in pieces of 16 KiB. */
  append(podUid: string, container: string, output: string | Buffer, stream = 'stdout'): void {
    const log = this.#log(podUid, container)
    let rest = Buffer.concat([log.pending.get(stream) ?? Buffer.alloc(0), Buffer.from(output)])
    for (;;) {
      const newline = rest.subarray(0, RECORD_BYTES_MAX).indexOf(NEWLINE)
      if (newline === -1 && rest.length < RECORD_BYTES_MAX) break
      const length = newline === -1 ? RECORD_BYTES_MAX : newline + 1
      this.#write(log, rest.subarray(0, length))
      rest = rest.subarray(length)
    }
    log.pending.set(stream, rest)
  }

  /** The container has ended: so do the follows of its log. */
  close(podUid: string, container: string): void {
    const log = this.#log(podUid, container)
    for (const [, rest] of log.pending) if (rest.length > 0) this.#write(log, rest)
    log.pending.clear()
    log.closed = true
    for (const listener of log.listeners) listener(undefined)
  }

  text(podUid: string, container: string): string {
    const { records } = this.#log(podUid, container)
    return Buffer.concat(records.map(({ bytes }) => bytes)).toString()
  }

  /** The last lines, as far as `bytes` reaches. */
  tail(podUid: string, container: string, lines: number, bytes: number): string {
    const { records } = this.#log(podUid, container)
    return Buffer.concat(records.slice(-lines).map((record) => record.bytes))
      .subarray(-bytes)
      .toString()
  }

  /** Of what was written until now a read sees nothing. */
  rotate(): void {
    for (const log of this.#logs.values()) rotate(log)
  }

  /** The pod is gone, and its files with it. */
  drop(podUid: string): void {
    for (const [key, log] of this.#logs) {
      if (!key.startsWith(`${podUid}/`)) continue
      this.#logs.delete(key)
      for (const listener of log.listeners) listener(undefined)
    }
  }

  serve(pod: Pod, query: URLSearchParams, response: ServerResponse): void {
    const { follow, tailLines, limitBytes, since, timestamps } = this.#options(pod, query)
    const container = containerOf(pod, query)
    if (!pod.spec.nodeName) {
      response.writeHead(204).end()
      return
    }
    if (this.unreachable.has(pod.metadata.name)) throw nodeUnreachable(pod, container)
    const containerId = readableContainer(pod, container, query.get('previous') === 'true')
    const head = () => response.writeHead(200, { 'content-type': 'text/plain' })
    if (this.unavailable.has(pod.metadata.name)) {
      head().end(`unable to retrieve container logs for ${containerId}`)
      return
    }
    const log = this.#log(pod.metadata.uid, container)
    let left = limitBytes
    let lineStart = true
    let stalled = false
    const write = ({ at, bytes }: LogRecord) => {
      if (stalled || left <= 0) return
      const isStart = lineStart
      // As kubelets do: the rest of a line that began too early has no time before it.
      lineStart = bytes.at(-1) === NEWLINE
      if (at < since) return
      const prefix = timestamps && isStart ? `${this.#timestamp(at)} ` : ''
      const output = Buffer.concat([Buffer.from(prefix), bytes]).subarray(0, left)
      left -= output.length
      response.write(output)
    }
    head()
    response.flushHeaders()
    // As on a node, where lines are found in the file before their times are looked at.
    const skipped = Math.max(0, log.records.length - (tailLines ?? Number.POSITIVE_INFINITY))
    for (const record of log.records.slice(skipped)) write(record)
    if (!follow || log.closed || left <= 0) {
      response.end()
      return
    }
    const listener = (record: LogRecord | undefined) => {
      if (record) write(record)
      if ((!record || left <= 0) && !stalled) response.end()
    }
    const stream: LogStream = {
      pod: pod.metadata.name,
      container,
      stall: () => {
        stalled = true
      },
      cut: () => response.destroy(),
      end: () => response.end(),
    }
    log.listeners.add(listener)
    this.streams.add(stream)
    response.on('close', () => {
      log.listeners.delete(listener)
      this.streams.delete(stream)
    })
  }

  #options(pod: Pod, query: URLSearchParams) {
    const problems: { field: string; problem: string; detail?: string }[] = []
    const number = (field: string, least: number) => {
      const text = query.get(field)
      if (text === null || text === '') return undefined
      if (!/^-?\d+$/.test(text))
        throw badRequest(`strconv.ParseInt: parsing "${text}": invalid syntax`)
      if (Number(text) < least) {
        const detail = `must be greater than ${least === 0 ? 'or equal to ' : ''}0`
        problems.push({ field, problem: `Invalid value: ${text}`, detail })
      }
      return Number(text)
    }
    const tailLines = number('tailLines', 0)
    const limitBytes = number('limitBytes', 1)
    const sinceSeconds = number('sinceSeconds', 1)
    const sinceTime = query.get('sinceTime')
    if (sinceSeconds !== undefined && sinceTime) {
      problems.push({
        field: '',
        problem: 'Forbidden',
        detail: 'at most one of `sinceTime` or `sinceSeconds` may be specified',
      })
    }
    if (problems.length > 0) throw invalid('PodLogOptions', '', pod.metadata.name, problems)
    const sinceMs = sinceTime
      ? Date.parse(sinceTime)
      : this.#clock.now() - (sinceSeconds ?? 0) * 1000
    if (Number.isNaN(sinceMs)) throw badRequest(`parsing time "${sinceTime}" as RFC3339`)
    return {
      follow: ['true', '1'].includes(query.get('follow') ?? ''),
      timestamps: ['true', '1'].includes(query.get('timestamps') ?? ''),
      tailLines,
      limitBytes: limitBytes ?? Number.POSITIVE_INFINITY,
      // The node is asked in whole seconds: fractions are lost, and lines of that second come again.
      since:
        sinceTime || sinceSeconds !== undefined
          ? BigInt(Math.floor(sinceMs / 1000)) * 1_000_000_000n
          : 0n,
    }
  }

  #log(podUid: string, container: string): ContainerLog {
    const key = `${podUid}/${container}`
    const log = this.#logs.get(key) ?? {
      records: [],
      bytes: 0,
      pending: new Map(),
      closed: false,
      listeners: new Set(),
    }
    this.#logs.set(key, log)
    return log
  }

  #write(log: ContainerLog, bytes: Buffer): void {
    const now = BigInt(Math.floor(this.#clock.now())) * 1_000_000n
    if (!this.stopped) this.#latest = now > this.#latest ? now : this.#latest + 1n
    const record = { at: this.#latest, bytes }
    if (log.bytes + bytes.length > this.rotateAtBytes) rotate(log)
    log.records.push(record)
    log.bytes += bytes.length
    for (const listener of log.listeners) listener(record)
  }

  #timestamp(at: bigint): string {
    const seconds = new Date(Number(at / 1_000_000n)).toISOString().slice(0, 19)
    const fraction = (at % 1_000_000_000n).toString().padStart(9, '0')
    if (this.timestampFormat === 'fixed') return `${seconds}.${fraction}Z`
    const trimmed = fraction.replace(/0+$/, '')
    return `${seconds}${trimmed && `.${trimmed}`}Z`
  }
}

function rotate(log: ContainerLog): void {
  log.records = []
  log.bytes = 0
}

function containerOf(pod: Pod, query: URLSearchParams): string {
  const { name } = pod.metadata
  const asked = query.get('container')
  const names = pod.spec.containers.map((container) => container.name)
  const inits = (pod.spec.initContainers ?? []).map((container) => container.name)
  if (asked) {
    if (![...names, ...inits].includes(asked)) {
      throw badRequest(`container ${asked} is not valid for pod ${name}`)
    }
    return asked
  }
  const [only, ...others] = names
  if (only && others.length === 0) return only
  const choices = `choose one of: [${names.join(' ')}]`
  const or = inits.length > 0 ? ` or one of the init containers: [${inits.join(' ')}]` : ''
  throw badRequest(`a container name must be specified for pod ${name}, ${choices}${or}`)
}

/** As the kubelet decides it, in `validateContainerLogStatus`. */
function readableContainer(pod: Pod, container: string, previous: boolean): string {
  const { name } = pod.metadata
  const statuses = [
    ...(pod.status.containerStatuses ?? []),
    ...(pod.status.initContainerStatuses ?? []),
  ]
  const status = statuses.find((status) => status.name === container)
  const who = `container "${container}" in pod "${name}"`
  if (!status) throw badRequest(`${who} is not available`)
  if (previous) {
    throw badRequest(`previous terminated container "${container}" in pod "${name}" not found`)
  }
  const { waiting, running, terminated } = status.state
  if (running) return status.containerID ?? ''
  if (terminated) {
    if (!terminated.containerID) throw badRequest(`${who} is terminated`)
    return terminated.containerID
  }
  const reasons: Record<string, string> = {
    ErrImagePull: "image can't be pulled",
    ImagePullBackOff: 'trying and failing to pull image',
  }
  const reason = waiting?.reason ?? ''
  throw badRequest(`${who} is waiting to start: ${reasons[reason] ?? reason}`)
}

const nodeUnreachable = (pod: Pod, container: string) =>
  new ApiError(
    500,
    'InternalError',
    `Get "https://10.0.0.1:10250/containerLogs/${pod.metadata.namespace}/${pod.metadata.name}/${container}": dial tcp 10.0.0.1:10250: connect: no route to host`,
  )
