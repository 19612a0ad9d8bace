import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { type SecretSource, UnusableSecretError } from '../core/ports.ts'

/** Linux takes no longer `NAME=value` (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h). */
const BYTES_MAX = 131_071 - 256

/**
 * Secrets as Docker and Kubernetes mount them, a file for each, or as variables `SECRET_<NAME>`; a file wins.
 * Files are read anew each time. Their last line end is not part of the value.
 */
export class FileSecretSource implements SecretSource {
  readonly #folder: string | undefined
  readonly #variables: Readonly<Record<string, string>>

  /** `variables`: value by what stands after `SECRET_`. */
  constructor(options: {
    folder: string | undefined
    variables: Readonly<Record<string, string>>
  }) {
    this.#folder = options.folder
    this.#variables = options.variables
  }

  async read(name: string): Promise<string | undefined> {
    // A name that could lead out of the folder is no name of a secret.
    if (!/^[A-Za-z0-9_][A-Za-z0-9._-]*$/.test(name)) return undefined
    const value = (await this.#fromFile(name)) ?? this.#fromVariable(name)
    if (value?.includes('\0')) throw new UnusableSecretError('holds a NUL character')
    return value
  }

  async #fromFile(name: string): Promise<string | undefined> {
    if (this.#folder === undefined) return undefined
    const path = join(this.#folder, name)
    try {
      const file = await stat(path)
      if (!file.isFile()) return undefined
      if (file.size > BYTES_MAX) {
        throw new UnusableSecretError(`is longer than ${BYTES_MAX} bytes`)
      }
      const text = new TextDecoder('utf-8', { fatal: true }).decode(await readFile(path))
      return text.replace(/\r?\n$/, '')
    } catch (err) {
      if (err instanceof UnusableSecretError) throw err
      const { code } = err as NodeJS.ErrnoException
      if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'ENAMETOOLONG') return undefined
      if (code === 'ERR_ENCODING_INVALID_ENCODED_DATA') {
        throw new UnusableSecretError('is not UTF-8 text')
      }
      throw new UnusableSecretError(`cannot be read (${code})`)
    }
  }

  #fromVariable(name: string): string | undefined {
    const spelled = name.toUpperCase().replace(/[.-]/g, '_')
    const key = [name, spelled].find((each) => Object.hasOwn(this.#variables, each))
    return key === undefined ? undefined : this.#variables[key]
  }
}
