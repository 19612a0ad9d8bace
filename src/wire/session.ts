import { z } from 'zod'

export const sessionSchema = z
  .object({
    needed: z.boolean().describe('Whether the service requires a token'),
    signed_in: z.boolean(),
  })
  .meta({ id: 'Session', examples: [{ needed: true, signed_in: false }] })

export const signInSchema = z
  .strictObject({ token: z.string().min(1).max(4096) })
  .meta({ id: 'SignInRequest', examples: [{ token: 'one of API_TOKENS' }] })
