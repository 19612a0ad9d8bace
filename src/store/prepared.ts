import type { Compilable } from 'kysely'

/** Placeholder of a parameter while the statement is compiled. */
class StandIn {
  readonly name: string

  constructor(name: string) {
    this.name = name
  }
}

/**
 * Returns a statement that is compiled once, at its first use: Kysely takes longer to compile the
 * statements of a task than SQLite to run them. `build` must use parameters only as values, without
 * conditions on them. No value may be undefined.
 */
export function prepared<Parameters extends object, Row>(
  build: (parameters: Parameters) => Compilable<Row>,
): (values: Parameters) => Compilable<Row> {
  const names = { get: (_: object, name: string) => new StandIn(name) }
  let text: ReturnType<Compilable<Row>['compile']> | undefined
  return (values) => ({
    compile() {
      // Safe: `build` only passes them to Kysely, which accepts any value as a parameter.
      text ??= build(new Proxy({}, names) as Parameters).compile()
      const parameters = text.parameters.map((parameter) =>
        // Safe: the type of `build` allows no other names.
        parameter instanceof StandIn ? values[parameter.name as keyof Parameters] : parameter,
      )
      return { ...text, parameters }
    },
  })
}
