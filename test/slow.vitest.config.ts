import config, { SLOW } from './vitest.config.ts'

/** `npm run test:slow`: the suites that `npm test` leaves out, so that it takes a few minutes. */
export default { ...config, test: { ...config.test, include: SLOW, exclude: [] } }
