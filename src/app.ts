import { mkdir } from 'node:fs/promises'
import fastifyCookie from '@fastify/cookie'
import Fastify, { type FastifyInstance, LogController } from 'fastify'
import { serializerCompiler, type ZodTypeProvider } from 'fastify-type-provider-zod'
import type { z } from 'zod'
import { HttpCallbackSender } from './callbacks/sender.ts'
import type { Config } from './config.ts'
import { CallbackDispatcher } from './core/callbacks.ts'
import { InvalidRequestError } from './core/errors.ts'
import { Masker } from './core/masking.ts'
import type { CallbackSender, DeliveryStore, TaskStore, WorkerBackend } from './core/ports.ts'
import { Reaper } from './core/reaper.ts'
import { Shared } from './core/shared.ts'
import { Statistics } from './core/statistics.ts'
import { Submissions } from './core/submissions.ts'
import type { Task } from './core/task.ts'
import { TaskFiles } from './core/task-files.ts'
import { TaskQueue } from './core/task-queue.ts'
import { TaskRunner } from './core/task-runner.ts'
import { Metrics } from './metrics/metrics.ts'
import { AddressGuard } from './net/address-guard.ts'
import { publishOpenApi } from './openapi.ts'
import { servePage } from './page.ts'
import { Authentication, requireToken } from './routes/authentication.ts'
import { installBodyParser } from './routes/body-parser.ts'
import {
  answerBrokenHttp,
  answerError,
  answerUnknownExpectation,
  installErrorHandler,
} from './routes/error-handler.ts'
import { healthRoutes } from './routes/health.ts'
import { KeptLogs } from './routes/log-pieces.ts'
import { metricsRoute } from './routes/metrics.ts'
import { sampleCallbackRoutes } from './routes/sample-callbacks.ts'
import { sessionRoutes } from './routes/session.ts'
import { closeIdleReaders } from './routes/slow-readers.ts'
import { statisticsRoute } from './routes/statistics.ts'
import { taskLogRoutes } from './routes/task-logs.ts'
import { taskRunnerRoute } from './routes/task-runner-route.ts'
import { taskRoutes } from './routes/tasks.ts'
import { workerRoutes } from './routes/workers.ts'
import { keyFromFolder, Sealer } from './secrets/sealing.ts'
import { openStorage } from './storage-from-config.ts'
import { VERSION } from './version.ts'
import { fieldErrors } from './wire/fields.ts'
import { parseWorkerFile } from './wire/worker-config.ts'
import { backendRules, newWorkerSetup, openBackend } from './workers-from-config.ts'

const BODY_BYTES_MAX = 4 * 1024 * 1024
const PARAM_LENGTH_MAX = 4096
/** Timeout of receiving a request, and of its handler; following a log is exempt. */
const REQUEST_TIMEOUT_MS = 30_000
/** Grace period of requests under way at shutdown. */
const CLOSE_GRACE_MS = 2_000
/** Share of the shutdown time that callback attempts get; the rest is for requests and store. */
const ATTEMPTS_SHARE = 0.9
const CONNECTIONS_MAX = 10_000
const SWEEP_MS = 60_000
/** sysexits.h: EX_SOFTWARE. */
const EXIT_CODE_OF_DEATH = 70

export interface Ports {
  tasks: TaskStore
  deliveries: DeliveryStore
  backend: WorkerBackend
  sender: CallbackSender
}

export interface AppOptions {
  config: Config
  /** Umask of the tasks; default: the process's. */
  taskUmask?: number
  /** Lets tests wrap the ports, to fail or crash at a chosen moment. */
  wrapPorts?: (ports: Ports) => Ports
  /** Called when a thread of the service has died. Default: `endProcess`. */
  onThreadDeath?: (err: Error) => void
  now?: () => number
  random?: () => number
  /** Address to listen at before any task is resumed: if it is in use, nothing has begun. */
  listen?: { host: string; port: number }
}

export interface App {
  /** Ready server. Closing it releases everything; running tasks go on. */
  http: FastifyInstance
  /** Its URL; undefined without `listen`. */
  address: string | undefined
  /**
   * Stops claiming, releases running tasks and waits for callback attempts under way. Requests are
   * still answered, new tasks and `/health/ready` with 503. Closing calls it, too. Idempotent.
   */
  stop(): Promise<void>
  reaper: Reaper
}

/** Wires the service and resumes unfinished tasks. Throws if the data folder is unusable. */
export async function buildApp(options: AppOptions): Promise<App> {
  const { config, random = Math.random, onThreadDeath = endProcess } = options
  const http = Fastify({
    logger: {
      level: config.logLevel,
      redact: [
        'req.headers.authorization',
        'headers.authorization',
        'req.headers.cookie',
        'headers.cookie',
        '*.token',
      ],
    },
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: BODY_BYTES_MAX,
    routerOptions: { ignoreTrailingSlash: true, maxParamLength: PARAM_LENGTH_MAX },
    forceCloseConnections: 'idle',
    requestTimeout: REQUEST_TIMEOUT_MS,
    handlerTimeout: REQUEST_TIMEOUT_MS,
    // Routes answer with the API's own error body instead.
    return503OnClosing: false,
    frameworkErrors: answerError,
    clientErrorHandler: answerBrokenHttp,
    // A hook rejects requests without one, with the API's error body.
    http: { requireHostHeader: false },
  }).withTypeProvider<ZodTypeProvider>()
  http.server.maxConnections = CONNECTIONS_MAX
  http.server.on('checkExpectation', answerUnknownExpectation)
  try {
    return await wire()
  } catch (err) {
    await http.close()
    throw err
  }

  async function wire(): Promise<App> {
    const { log } = http
    await mkdir(config.dataDir, { recursive: true, mode: 0o700 })
    const sealer = new Sealer(config.sealingKey ?? (await keyFromFolder(config.dataDir)))

    const storage = await openStorage(config, sealer, { log, onThreadDeath })
    http.addHook('onClose', () => storage.close())
    const { shared } = storage
    const now = options.now ?? shared?.now ?? Date.now

    const guard = new AddressGuard(config.callbackAllowedNetworks, {
      setting: 'CALLBACK_ALLOWED_NETWORKS',
      samplesAreOn: config.sampleCallbacks,
    })
    const gitGuard = new AddressGuard(config.gitAllowedNetworks, {
      setting: 'GIT_ALLOWED_NETWORKS',
    })
    http.addHook('onListen', async () => {
      const address = http.server.address()
      const port = typeof address === 'object' ? address?.port : undefined
      guard.ownPort = port
      gitGuard.ownPort = port
    })
    const { wrapPorts = (ports) => ports } = options
    const ports = wrapPorts({
      tasks: storage.tasks,
      deliveries: storage.deliveries,
      backend: await openBackend(config, {
        umask: options.taskUmask ?? process.umask(),
        deployment: storage.deployment,
        legacyInstance: sealer.derive('deployment').toString('hex').slice(0, 16),
        onThreadDeath,
        now,
        log,
      }),
      sender: new HttpCallbackSender({
        timeoutMs: config.callbackTimeoutMs,
        userAgent: `task-runner/${VERSION}`,
        guard,
        signingKeys: config.callbackSigningKeys,
      }),
    })
    http.addHook('onClose', () => ports.backend.close())
    http.addHook('onClose', () => ports.sender.close())
    const { sender } = ports
    const metrics = new Metrics({ tasks: ports.tasks, backend: ports.backend, now })
    const tasks = metrics.tasks(ports.tasks)
    const deliveries = metrics.deliveries(ports.deliveries)
    const backend = metrics.backend(ports.backend)

    const callbacks = new CallbackDispatcher({
      store: deliveries,
      sender,
      schedule: { delaysMs: config.callbackRetryDelaysMs, random },
      attemptTimeoutMs: config.callbackTimeoutMs,
      now,
      isClockOurs: !shared,
      log,
    })
    const statistics = new Statistics(storage.statistics, now)
    const isHostBound = config.workerBackend === 'local'
    /** Returns the instance on whose host a task's worker runs, if it is another one. */
    const elsewhere = ({ instance }: Task) =>
      isHostBound && instance !== storage.instance ? (instance ?? undefined) : undefined
    const maskers = new Shared<Masker>()
    const maskerFor = (task: Task) => {
      const values = [task.callbackUrlToken, ...task.secretValues, ...config.apiTokens]
      return maskers.get(JSON.stringify(values), () => new Masker(values))
    }
    const rules = backendRules(config)
    const files = new TaskFiles(config.tasksDir, (content) => parseWorkerFile(content, rules))
    const setup = newWorkerSetup(config, files, gitGuard)
    const queue = new TaskQueue({
      store: tasks,
      hints: shared?.hints,
      concurrency: config.concurrency,
      runningMax: config.clusterConcurrency,
      // Counted before any task is accepted; the queue counts from then on.
      length: await storage.tasks.countQueued(config.queuedMax),
      queuedMax: config.queuedMax,
      now,
      log,
    })
    const runner = new TaskRunner({
      store: tasks,
      queue,
      backend,
      callbacks,
      cluster: shared?.cluster,
      hints: shared?.hints,
      provisioningTimeoutMs: config.provisioningTimeoutMs,
      setup,
      onProvisioningFailed: () => reaper.cleanUpStuck(),
      maskerFor,
      now,
      log,
    })
    const reaper = new Reaper({
      store: tasks,
      backend,
      keptWorkerMs: config.keptWorkerMs,
      provisioningTimeoutMs: config.provisioningTimeoutMs,
      retentionMs: config.retentionMs,
      instance: shared && isHostBound ? storage.instance : undefined,
      intervalMs: SWEEP_MS,
      onLeaked: (workers) => metrics.leaked(workers),
      now,
      log,
    })
    const submissions = new Submissions(
      { store: tasks, queue, files, setup },
      {
        queuedMax: config.queuedMax,
        defaultTimeoutSeconds: config.taskTimeoutSeconds,
        digestKey: sealer.derive('request digest'),
        taskFilesProblem: async () => backend.taskFilesProblem?.(),
        callbackUrlRefusal: (url) => guard.refusal(new URL(url)),
        now,
        log,
      },
    )
    let isStopping = false
    const stop = async () => {
      isStopping = true
      // With other instances, we still accept tasks, and they run them.
      if (!shared) submissions.drain()
      const attemptsMs = config.shutdownGraceMs * ATTEMPTS_SHARE
      await Promise.all([runner.close(), callbacks.close(attemptsMs), reaper.close()])
    }
    http.addHook('onClose', stop)
    http.addHook('onSend', async (_request, reply) => {
      // Else the next request on a kept-alive connection would fail.
      if (isStopping) reply.header('connection', 'close')
    })
    http.addHook('preClose', async () => {
      // A request that never ends must not block the shutdown.
      setTimeout(() => http.server.closeAllConnections(), CLOSE_GRACE_MS).unref()
    })

    http.setValidatorCompiler(({ schema }) => (data) => {
      // Safe: every schema is zod's.
      const result = (schema as z.ZodType).safeParse(data)
      if (result.success) return { value: result.data }
      return { error: new InvalidRequestError(fieldErrors(result.error)) }
    })
    http.setSerializerCompiler(serializerCompiler)
    installErrorHandler(http)
    installBodyParser(http)
    closeIdleReaders(http)
    const kept = new KeptLogs(tasks)
    const { basePath } = config
    await http.register(fastifyCookie)
    const authentication = new Authentication({
      tokens: config.apiTokens,
      loopbackOnly: !config.authOff,
    })
    await publishOpenApi(http, { basePath, needsToken: authentication.needsToken })
    await servePage(http, { basePath })
    await http.register(
      async (api) => {
        await api.register(healthRoutes, {
          parts: {
            store: () => tasks.check(),
            workers: () => backend.check(),
            tasks_folder: () => files.check(),
          },
          warnings: async () => [
            ...(await files.warnings()),
            ...runner.hindrances().map((hindrance) => `Tasks wait: ${hindrance}`),
          ],
          isDraining: () => isStopping,
        })
        await api.register(sessionRoutes, { authentication, basePath })
        if (config.sampleCallbacks) await api.register(sampleCallbackRoutes)
        await api.register(async (secured) => {
          requireToken(secured, authentication)
          await secured.register(taskRunnerRoute, {
            submissions,
            files,
            timeoutSecondsMax: config.taskTimeoutSeconds,
            rules,
            basePath,
            samplesAreOff: !config.sampleCallbacks,
          })
          await secured.register(taskRoutes, { tasks, deliveries, runner, callbacks })
          await secured.register(taskLogRoutes, { tasks, kept, backend, maskerFor, elsewhere })
          await secured.register(metricsRoute, { metrics })
          await secured.register(statisticsRoute, { statistics, tasks, now })
          await secured.register(workerRoutes, { tasks, kept, backend, runner, reaper, maskerFor })
        })
      },
      { prefix: basePath },
    )
    await http.ready()
    const address = options.listen && (await http.listen(options.listen))
    await runner.start()
    callbacks.start()
    shared?.listen({
      tasksWait: () => queue.look(),
      cancelRequested: (taskId) => runner.cancelRun(taskId),
    })
    reaper.start(async () => {
      const leads = shared === undefined || (await shared.leads())
      // Local workers can be reached from their own host alone.
      if (leads || isHostBound) await reaper.sweepWorkers()
      if (leads) await reaper.sweepTasks()
    })
    return { http, address, stop, reaper }
  }
}

/** Ends the process, which cannot work without the thread; a supervisor restarts it. */
function endProcess({ message }: Error): never {
  process.stderr.write(`The service ends: ${message.replaceAll('\n', ' ')}\n`)
  process.exit(EXIT_CODE_OF_DEATH)
}
