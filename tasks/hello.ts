/** Prints a greeting; `.js`, `.mjs` and `.ts` files run on the service's own Node. */
const taskId: string | undefined = process.env.TASK_ID
console.log(`Hello from Node ${process.version}, task ${taskId}`)
