import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { type SecretSource, UnusableSecretError } from '../core/ports.ts'

/** Limit of a `NAME=value` on Linux (MAX_ARG_STRLEN in binfmts.h), less 256 bytes for the name. */
const BYTES_MAX = 131_071 - 256
const MISSING = ['ENOENT', 'ENOTDIR', 'ENAMETOOLONG']
/** Errors that last until an operator repairs the file; all others count as temporary. */
const UNUSABLE = ['EACCES', 'EPERM', 'ELOOP']

/**
 * Reads secrets from files, as mounted by Docker and Kubernetes, or from variables `SECRET_<NAME>`;
 * a file wins. Reads files every time, without their last line end.
 */
export class FileSecretSource implements SecretSource {
  readonly #folder: string | undefined
  readonly #variables: Readonly<Record<string, string>>

  /** `variables`: values by the part of the name after `SECRET_`. */
  constructor(options: {
    folder: string | undefined
    variables: Readonly<Record<string, string>>
  }) {
    this.#folder = options.folder
    this.#variables = options.variables
  }

  async read(name: string): Promise<string | undefined> {
    const value = (await this.#fromFile(name)) ?? this.#fromVariable(name)
    if (value === undefined) await this.#checkFolder()
    if (value?.includes('\0')) throw new UnusableSecretError('holds a NUL character')
    return value
  }

  async #fromFile(name: string): Promise<string | undefined> {
    // No file outside the folder, and none of the dot files of Kubernetes mounts, is a secret.
    if (this.#folder === undefined || /^\.|[/\0]/.test(name)) return undefined
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
      if (MISSING.includes(code ?? '')) return undefined
      if (code === 'ERR_ENCODING_INVALID_ENCODED_DATA') {
        throw new UnusableSecretError('is not UTF-8 text')
      }
      if (UNUSABLE.includes(code ?? '')) throw new UnusableSecretError(`cannot be read (${code})`)
      throw new Error(`The secret "${name}" cannot be read at the moment (${code})`, { cause: err })
    }
  }

  /** Throws if the folder is gone (it existed at start): its secrets only seem to be missing. */
  async #checkFolder(): Promise<void> {
    if (this.#folder === undefined) return
    try {
      await stat(this.#folder)
    } catch (err) {
      const { code } = err as NodeJS.ErrnoException
      throw new Error(`The folder SECRETS_DIR cannot be read (${code})`, { cause: err })
    }
  }

  #fromVariable(name: string): string | undefined {
    const spelled = name.toUpperCase().replace(/[^A-Z0-9_]/gu, '_')
    const key = [name, spelled].find((each) => Object.hasOwn(this.#variables, each))
    return key === undefined ? undefined : this.#variables[key]
  }
}
