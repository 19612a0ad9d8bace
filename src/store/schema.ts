import type { Generated } from 'kysely'
import type { CallbackStatus, Reason, TaskStatus } from '../core/task.ts'

/** Instants are epoch ms. Booleans are 0 and 1, which both databases support. */
export interface Database {
  tasks: TasksTable
  task_logs: TaskLogsTable
  deliveries: DeliveriesTable
  delivery_attempts: DeliveryAttemptsTable
  instances: InstancesTable
  settings: SettingsTable
}

export interface TasksTable {
  /** Order of acceptance. */
  seq: Generated<number>
  task_id: string
  task_file_name: string
  status: TaskStatus
  reason: Reason | null
  message: string | null
  exit_code: number | null
  signal: string | null
  worker_name: string
  /** `live`: to be terminated after the outcome. `kept`: kept for debugging. `gone`: terminated. */
  worker_state: 'none' | 'live' | 'kept' | 'gone'
  terminate_on_completion: number
  timeout_seconds: number
  has_callback: number
  priority: Generated<number>
  claim: number
  /** Instance that claimed it last. */
  instance: string | null
  traceparent: string | null
  cancel_requested_at: number | null
  created_at: number
  claimed_at: number | null
  started_at: number | null
  finished_at: number | null
  log_bytes: number | null
  digest: string
  /** Worker configuration, callback URL and token: JSON, encrypted. */
  sealed: Uint8Array
  /** Sentence for people that says what a live task waits for. */
  waiting_for: string | null
}

export interface TaskLogsTable {
  task_id: string
  encoding: 'plain' | 'zstd'
  content: Uint8Array
  total_bytes: number
}

export interface DeliveriesTable {
  task_id: string
  webhook_id: string
  origin: string
  status: Exclude<CallbackStatus, 'none'>
  attempts: number
  /** How many of the attempts were requested by people, in addition to the schedule. */
  manual_attempts: Generated<number>
  /** Whether a person requested the next attempt. */
  manual: number
  /** When the schedule resumes after that attempt; null if it has ended. */
  resume_at: number | null
  delivered_at: number | null
  /** While an attempt is under way: the end of its lease. */
  next_attempt_at: number | null
  leased: number
}

export interface DeliveryAttemptsTable {
  task_id: string
  number: number
  started_at: number
  duration_ms: number
  status_code: number | null
  error: string | null
  manual: Generated<number>
}

/** Instances that share a Postgres. */
export interface InstancesTable {
  name: string
  /** Whether its workers can be reached only from its host. */
  host_bound: number
  /** Last heartbeat, by the database's clock; 0: the instance has left. */
  beat_at: number
}

/** Settings of the database as a whole. */
export interface SettingsTable {
  name: string
  value: string
}
