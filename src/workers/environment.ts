/** What the environment of every task begins with, on all backends. A request may set other values. */
export const COMMON_ENVIRONMENT: Readonly<Record<string, string>> = {
  // Started by a shell script, Python would show nothing until it ends, and nothing at all when it is stopped.
  PYTHONUNBUFFERED: '1',
}
