import type { Generated } from 'kysely'
import type { CallbackStatus, Reason, TaskStatus } from '../core/task.ts'

/** Instants are epoch ms. Truth values are 0 and 1, which both databases have. */
export interface Database {
  tasks: TasksTable
  task_logs: TaskLogsTable
  deliveries: DeliveriesTable
  delivery_attempts: DeliveryAttemptsTable
  instances: InstancesTable
  settings: SettingsTable
}

export interface TasksTable {
  /** In the order of acceptance. */
  seq: Generated<number>
  task_id: string
  task_file_name: string
  status: TaskStatus
  reason: Reason | null
  message: string | null
  exit_code: number | null
  signal: string | null
  worker_name: string
  /** `none`: never had one. `live`: to be terminated after the outcome. `kept`: for a look inside. `gone`. */
  worker_state: 'none' | 'live' | 'kept' | 'gone'
  terminate_on_completion: number
  timeout_seconds: number
  has_callback: number
  priority: Generated<number>
  claim: number
  /** Who claimed it last. */
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
  /** What a live task waits for, for people. */
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
  /** How many of them a person asked for: they are none of the schedule. */
  manual_attempts: Generated<number>
  /** A person has asked for the next attempt. */
  manual: number
  /** When the schedule goes on after that attempt; null where it has ended. */
  resume_at: number | null
  delivered_at: number | null
  /** While an attempt is under way: when its lease ends, and another may be made. */
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
  /** Its workers can be reached from its host only. */
  host_bound: number
  /** By the database's clock; 0: it has left. */
  beat_at: number
}

/** What holds for the database as a whole. */
export interface SettingsTable {
  name: string
  value: string
}
