/** Variables of every task, on all backends. A request may override them. */
export const COMMON_ENVIRONMENT: Readonly<Record<string, string>> = {
  // Python that a shell script starts would buffer its output, and lose it when stopped.
  PYTHONUNBUFFERED: '1',
}
