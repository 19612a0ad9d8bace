import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { type SecretSource, UnusableSecretError } from '../core/ports.ts'

/** Linux takes no longer `NAME=value` (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h). */
const BYTES_MAX = 131_071 - 256
/**
 * The file is not there, or is of no use to anybody until its owner mends it. All others may pass.
 */
const MISSING = ['ENOENT', 'ENOTDIR', 'ENAMETOOLONG']
const UNUSABLE = ['EACCES', 'EPERM', 'ELOOP']

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
    const value = (await this.#fromFile(name)) ?? this.#fromVariable(name)
    if (value === undefined) await this.#checkFolder()
    if (value?.includes('\0')) throw new UnusableSecretError('holds a NUL character')
    return value
  }

  async #fromFile(name: string): Promise<string | undefined> {
    // A name that could lead out of the folder is none of its files, nor is what mounts keep there for themselves.
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

  /** Throws while the folder is away: nobody knows what it holds. It was there at the start. */
  async #checkFolder(): Promise<void> {
    if (this.#folder === undefined) return
    try {
      await stat(this.#folder)
    } catch (err) {
      const { code } = err as NodeJS.ErrnoException
      throw new Error(`The folder SECRETS_DIR is away (${code})`, { cause: err })
    }
  }

  #fromVariable(name: string): string | undefined {
    const spelled = name.toUpperCase().replace(/[^A-Z0-9_]/gu, '_')
    const key = [name, spelled].find((each) => Object.hasOwn(this.#variables, each))
    return key === undefined ? undefined : this.#variables[key]
  }
}
