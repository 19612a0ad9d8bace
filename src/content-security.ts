import fastifyHelmet from '@fastify/helmet'
import type { FastifyInstance } from 'fastify'

/**
 * Adds security headers for pages: nothing from other origins, no inline scripts, no framing.
 * `inlineStyles` allows inline styles, which Swagger UI needs.
 */
export async function secureContent(
  app: FastifyInstance,
  options: { inlineStyles: boolean },
): Promise<void> {
  await app.register(fastifyHelmet, {
    contentSecurityPolicy: {
      useDefaults: false,
      directives: {
        defaultSrc: ["'none'"],
        scriptSrc: ["'self'"],
        styleSrc: options.inlineStyles ? ["'self'", "'unsafe-inline'"] : ["'self'"],
        imgSrc: ["'self'", 'data:'],
        fontSrc: ["'self'"],
        connectSrc: ["'self'"],
        baseUri: ["'none'"],
        formAction: ["'none'"],
        frameAncestors: ["'none'"],
      },
    },
    // The service cannot know whether a proxy in front of it uses TLS.
    strictTransportSecurity: false,
  })
}
