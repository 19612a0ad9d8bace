/**
 * Moves bytes from a pipe into a file. With splice(2) they never leave the kernel: whoever is killed meanwhile has moved them, or
 * they are still in the pipe. Where Node cannot call it, they are read and written, and a kill in between loses what was read.
 */
import { readSync, writeSync } from 'node:fs'
import { getSystemErrorName } from 'node:util'
import { codeOf } from './failures.ts'

/** As much as a pipe holds. */
const CHUNK_BYTES = 64 * 1024
/** SPLICE_F_MOVE and SPLICE_F_NONBLOCK. */
const FLAGS = 3
const EAGAIN = 11
/** A file system, or a limit on system calls, that does not know it. */
const UNKNOWN: readonly number[] = [1, 22, 38]

const splice = openSplice()
let isKnown = splice !== undefined
let chunk: Buffer | undefined

/**
 * Moves what is in the pipe, at most a chunk, to the offset `at` of the file, and returns how many bytes. 0: it was empty. `pipe` must not block. Throws errors of the
 * file; the bytes are still in the pipe then, or are lost where they had to be read.
 */
export function moveChunk(pipe: number, file: number, at: number): number {
  if (isKnown) {
    const { bytes, errno } = splice?.(pipe, file, at) ?? { bytes: -1, errno: UNKNOWN[0] ?? 0 }
    if (bytes >= 0) return bytes
    if (errno === EAGAIN) return 0
    if (!UNKNOWN.includes(errno)) throw systemError(errno)
    isKnown = false
  }
  const read = readChunk(pipe)
  for (let written = 0; written < read.length; ) {
    written += writeSync(file, read, written, read.length - written, at + written)
  }
  return read.length
}

/** Returns how many bytes were in the pipe, at most a chunk. They are gone. */
export function discardChunk(pipe: number): number {
  return readChunk(pipe).length
}

function readChunk(pipe: number): Buffer {
  chunk ??= Buffer.allocUnsafeSlow(CHUNK_BYTES)
  try {
    return chunk.subarray(0, readSync(pipe, chunk))
  } catch (err) {
    if (codeOf(err) !== 'EAGAIN') throw err
    return chunk.subarray(0, 0)
  }
}

function systemError(errno: number): Error {
  const code = getSystemErrorName(-errno)
  return Object.assign(new Error(`${code}: splice`), { code, syscall: 'splice' })
}

type Splice = (pipe: number, file: number, at: number) => { bytes: number; errno: number }

/** Undefined before Node 26.1, and where it was built without. */
function openSplice(): Splice | undefined {
  const ffi = process.getBuiltinModule('node:ffi')
  if (!ffi) return undefined
  const { functions } = ffi.dlopen(null, {
    splice: {
      arguments: ['int32', 'pointer', 'int32', 'buffer', 'uint64', 'uint32'],
      return: 'int64',
    },
    __errno_location: { arguments: [], return: 'pointer' },
  })
  // One for each thread: this one's.
  const errnoAt = functions.__errno_location()
  const offset = Buffer.alloc(8)
  return (pipe, file, at) => {
    offset.writeBigInt64LE(BigInt(at))
    const bytes = functions.splice(pipe, 0n, file, offset, BigInt(CHUNK_BYTES), FLAGS)
    return { bytes: Number(bytes), errno: ffi.getInt32(errnoAt, 0) }
  }
}
