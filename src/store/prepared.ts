import type { Compilable } from 'kysely'

/** Stands for a parameter while the text is made. */
class StandIn {
  readonly name: string

  constructor(name: string) {
    this.name = name
  }
}

/**
 * A statement whose text is made at its first use: for what every task writes, Kysely takes longer to make the text than SQLite to
 * run it. `build` must use each parameter as a value only; what depends on one belongs into the SQL. No value may
 * be undefined.
 */
export function prepared<Parameters extends object, Row>(
  build: (parameters: Parameters) => Compilable<Row>,
): (values: Parameters) => Compilable<Row> {
  const names = { get: (_: object, name: string) => new StandIn(name) }
  let text: ReturnType<Compilable<Row>['compile']> | undefined
  return (values) => ({
    compile() {
      // Holds: `build` only hands them on to Kysely, which takes any value for a parameter.
      text ??= build(new Proxy({}, names) as Parameters).compile()
      const parameters = text.parameters.map((parameter) =>
        // Holds: `build` could ask for no other names.
        parameter instanceof StandIn ? values[parameter.name as keyof Parameters] : parameter,
      )
      return { ...text, parameters }
    },
  })
}
